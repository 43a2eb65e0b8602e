"""Files that only the holder of a key can read or write: ``docs/sealed-files.md``.

stream       one file: Tink's AES-GCM-HKDF streaming construction, written and read in segments
key          ``SealingKey``, and where it is read from
place        ``Sealed``: a sealed file or folder, given where a path is expected
folder       what a sealed folder holds; sealing and unsealing
counter      numbers kept outside, by which an older checkpoint is found
tpm          the same in a TPM 2.0
"""

from .counter import Counter, FileCounter, parse_counter
from .folder import seal, unseal
from .key import SealingKey, key_file_from_flags, new_key_file, read_key
from .place import SUFFIX, FolderIndex, Sealed
from .stream import SealedReader, SealedWriter

__all__ = [
    "SUFFIX",
    "Counter",
    "FileCounter",
    "FolderIndex",
    "Sealed",
    "SealedReader",
    "SealedWriter",
    "SealingKey",
    "key_file_from_flags",
    "new_key_file",
    "parse_counter",
    "read_key",
    "seal",
    "unseal",
]

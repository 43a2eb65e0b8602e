"""What tests of sealed files share: small segments, and files damaged in every way."""

import io
import os

from hotloop.sealed import SealedReader, SealedWriter

SECRET = bytes(range(32))
WHAT = b"a test's file"


def sealed(data, secret=SECRET, what=WHAT):
    out = bytearray()
    writer = SealedWriter(out.extend, secret, what)
    writer.write(data)
    writer.finish()
    return bytes(out)


def opened(path, secret=SECRET, what=WHAT):
    return io.BufferedReader(SealedReader(os.open(path, os.O_RDONLY), secret, what, path.name))


def damaged(data, other, random):
    """``data`` with one damage drawn by ``random``; ``other`` is another sealed file."""
    at, end = sorted(random.randrange(len(data) + 1) for _ in range(2))
    changed = bytearray(data)
    match random.randrange(8):
        case 0:
            changed[random.randrange(len(data))] ^= 1 << random.randrange(8)
        case 1:
            del changed[at:]
        case 2:
            changed += os.urandom(random.randrange(1, 5000))
        case 3:
            del changed[at:end]
        case 4:
            changed[at:end] = bytes(end - at)
        case 5:
            changed = changed[at:] + changed[:at]
        case 6:
            changed[at:end] = other[at:end]
        case 7:
            changed[at:at] = changed[at:end]
    return bytes(changed)

"""Power cuts on a disk that reorders and drops what was not synced.

A save is recorded at its system calls. For a cut after any of them, the disk keeps what was synced
and, of the rest, any subset: of each file a prefix, perhaps with zeros where data did not arrive;
of each folder any of its changes, in order. The model is the strictest reading of POSIX; real file
systems promise more, each something else. What may be left is written out and loaded.
"""

import dataclasses
import random

import pytest

from hotloop.train.checkpoint import CheckpointStore
from hotloop.train.system_calls import Files
from support.checkpoint_samples import QuickFiles, save_sample, variant_of


@dataclasses.dataclass
class Node:
    """A file (``data``) or a folder (``entries``), as seen now and as synced."""

    data: bytearray | None = None
    entries: dict | None = None
    synced: bytes = b""
    synced_entries: dict = dataclasses.field(default_factory=dict)
    pending: list = dataclasses.field(default_factory=list)

    def change(self, *edits):
        """One atomic change of a folder: (name, node or None) pairs."""
        self.pending.append(edits)
        apply(self.entries, edits)


def apply(entries, edits):
    for name, node in edits:
        if node is None:
            entries.pop(name, None)
        else:
            entries[name] = node


class RecordingFiles(Files):
    """Real system calls, and the same on a model of the disk; a tick after each."""

    def __init__(self, root, *, ignore_fsync=None, on_tick=lambda: None):
        self.root = root
        self.tree = mirror(root)
        self.nodes = {}
        self.synced_paths = []
        self.ignore_fsync = ignore_fsync
        self.on_tick = on_tick

    def node(self, path):
        found = self.tree
        for part in path.relative_to(self.root).parts:
            found = found.entries[part]
        return found

    def create(self, path):
        fd = super().create(path)
        self.nodes[fd] = (path, Node(data=bytearray()))
        self.node(path.parent).change((path.name, self.nodes[fd][1]))
        self.on_tick()
        return fd

    def open_folder(self, path):
        fd = super().open_folder(path)
        self.nodes[fd] = (path, self.node(path))
        return fd

    def write(self, fd, data):
        taken = super().write(fd, data)
        self.nodes[fd][1].data += bytes(data[:taken])
        self.on_tick()
        return taken

    def fsync(self, fd):
        path, node = self.nodes[fd]
        self.synced_paths.append(path)
        if len(self.synced_paths) - 1 != self.ignore_fsync:
            if node.entries is None:
                node.synced = bytes(node.data)
            else:
                node.synced_entries = dict(node.entries)
                node.pending = []
        self.on_tick()

    def make_folder(self, path):
        super().make_folder(path)
        self.node(path.parent).change((path.name, Node(entries={})))
        self.on_tick()

    def rename(self, old, new):
        super().rename(old, new)
        self.node(old.parent).change((old.name, None), (new.name, self.node(old)))
        self.on_tick()

    def remove_file(self, path):
        super().remove_file(path)
        self.node(path.parent).change((path.name, None))
        self.on_tick()

    def remove_folder(self, path):
        super().remove_folder(path)
        self.node(path.parent).change((path.name, None))
        self.on_tick()


def mirror(path):
    """The model of a tree that is on the disk with all it has."""
    if path.is_dir():
        entries = {each.name: mirror(each) for each in path.iterdir()}
        return Node(entries=entries, synced_entries=dict(entries))
    return Node(data=bytearray(path.read_bytes()), synced=path.read_bytes())


class DropAll:
    """The disk keeps what was synced and nothing else."""

    def chosen(self, changes):
        return []

    def contents(self, synced, data):
        return synced


class KeepNamesLoseData(DropAll):
    """What happens most: the journal is on the disk, the data is not."""

    def chosen(self, changes):
        return changes

    def contents(self, synced, data):
        return synced + bytes(len(data) - len(synced))


class KeepLastName(DropAll):
    """The disk wrote the newest change first."""

    def chosen(self, changes):
        return changes[-1:]


class AnySubset:
    """Of the changes some, of the data a beginning and zeros, drawn from the seed."""

    def __init__(self, seed):
        self.random = random.Random(seed)

    def chosen(self, changes):
        share = self.random.choice([0.2, 0.5, 0.9])
        return [change for change in changes if self.random.random() < share]

    def contents(self, synced, data):
        end = self.random.randint(len(synced), len(data))
        middle = self.random.choice([end, self.random.randint(len(synced), end)])
        return bytes(data[:middle]) + bytes(end - middle)


EXTREMES = [DropAll(), KeepNamesLoseData(), KeepLastName()]
FATES = [*EXTREMES, *(AnySubset(seed) for seed in range(4))]


def remains(node, fate):
    """What the disk may hold after a cut now: the bytes of a file, (name, what it holds) pairs."""
    if node.entries is None:
        return fate.contents(node.synced, bytes(node.data))
    entries = dict(node.synced_entries)
    for change in fate.chosen(node.pending):
        apply(entries, change)
    return tuple((name, remains(child, fate)) for name, child in sorted(entries.items()))


def write_out(tree, path):
    if isinstance(tree, bytes):
        path.write_bytes(tree)
        return
    path.mkdir()
    for name, child in tree:
        write_out(child, path / name)


def first_save(root):
    return "new/run", 1, None, (7, "a")


def next_step(root):
    save_sample(CheckpointStore(root / "run", files=QuickFiles()), 6)
    return "run", 1, (6, "a"), (7, "a")


def same_step(root):
    save_sample(CheckpointStore(root / "run", files=QuickFiles()), 7)
    return "run", 2, (7, "a"), (7, "b")


SCENARIOS = [first_save, next_step, same_step]


def losses(scenario, folder, *, ignore_fsync=None, fates=FATES):
    """Cuts after which neither the old nor the new loads, or not the new after save returned."""
    root = folder / "real"
    root.mkdir()
    run, keep_last, old, new = scenario(root)
    lost = []
    seen = {}
    returned = False

    def cut():
        for fate in fates:
            tree = remains(files.tree, fate)
            if tree not in seen:
                after = folder / f"after {len(seen)}"
                write_out(tree, after)
                try:
                    seen[tree] = variant_of(CheckpointStore(after / run).latest())
                except Exception as error:
                    seen[tree] = f"{type(error).__name__}: {error}"
            found = seen[tree]
            if found != new and (returned or found != old):
                lost.append((len(files.synced_paths), type(fate).__name__, found))

    files = RecordingFiles(root, ignore_fsync=ignore_fsync, on_tick=cut)
    save_sample(CheckpointStore(root / run, keep_last=keep_last, files=files), *new)
    returned = True
    cut()
    return lost, [path.relative_to(root) for path in files.synced_paths]


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.__name__)
def test_after_a_power_cut_the_old_or_the_new_loads(tmp_path, scenario):
    assert losses(scenario, tmp_path)[0] == []


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.__name__)
def test_leaving_out_any_sync_that_matters_would_lose_a_checkpoint(tmp_path, scenario):
    """The model sees what it is there to see: each sync left out shows as a loss."""
    dry = tmp_path / "dry"
    dry.mkdir()
    _, synced = losses(scenario, dry, fates=[])
    needed = set()
    for index, path in enumerate(synced):
        folder = tmp_path / str(index)
        folder.mkdir()
        lost, _ = losses(scenario, folder, ignore_fsync=index, fates=EXTREMES)
        if lost:
            needed.add("aside" if path.name.startswith(".tmp-") else path.name)
    files = {"model.safetensors", "optimizer.safetensors", "document.json", "manifest.json"}
    assert needed >= files | {"aside", "run"}

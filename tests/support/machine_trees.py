"""Trees of files as kernels of other machines show them, written from short descriptions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import pytest

from hotloop.machine import Machine

Files = dict[str, str]

XEON_FLAGS = (
    "fpu lm avx avx2 fma avx512f avx512_vnni avx512_bf16 amx_bf16 amx_tile amx_int8 "
    "cx16 lahf_lm popcnt pni sse4_1 sse4_2 ssse3 abm bmi1 bmi2 f16c movbe "
    "avx512bw avx512cd avx512dq avx512vl"
)
EPYC_FLAGS = "fpu lm avx avx2 fma"
LAPTOP_FLAGS = "fpu lm avx avx2 fma avx_vnni"
GRAVITON_FEATURES = "fp asimd evtstrm aes atomics fphp asimdhp asimddp sve i8mm bf16"


def ranges(numbers: Iterable[int]) -> str:
    return ",".join(map(str, sorted(numbers)))


def cpu_files(
    cores: Mapping[int, tuple[tuple[int, ...], int]],
    caches: Iterable[tuple[int, str, str, tuple[int, ...]]],
) -> Files:
    """sysfs of cores ``{core id: (cpu ids, socket)}`` and caches ``(level, type, size, cpus)``."""
    files: Files = {}
    online: list[int] = []
    folder = "sys/devices/system/cpu"
    for core_id, (cpus, socket) in cores.items():
        for cpu in cpus:
            online.append(cpu)
            topology = f"{folder}/cpu{cpu}/topology"
            files[f"{topology}/physical_package_id"] = str(socket)
            files[f"{topology}/core_id"] = str(core_id)
            files[f"{topology}/core_cpus_list"] = ranges(cpus)
    index_of: dict[int, int] = {}
    for level, kind, size, cpus in caches:
        for cpu in cpus:
            index = index_of.get(cpu, 0)
            index_of[cpu] = index + 1
            cache = f"{folder}/cpu{cpu}/cache/index{index}"
            files[f"{cache}/level"] = str(level)
            files[f"{cache}/type"] = kind
            files[f"{cache}/size"] = size
            files[f"{cache}/coherency_line_size"] = "64"
            files[f"{cache}/shared_cpu_list"] = ranges(cpus)
    files[f"{folder}/online"] = f"0-{len(online) - 1}"
    return files


def node_files(nodes: Mapping[int, tuple[Iterable[int], int]], far: int) -> Files:
    """NUMA nodes ``{number: (cpus, GiB)}``, ``far`` apart."""
    files: Files = {}
    for number, (cpus, gib) in nodes.items():
        folder = f"sys/devices/system/node/node{number}"
        files[f"{folder}/cpulist"] = ranges(cpus)
        files[f"{folder}/meminfo"] = (
            f"Node {number} MemTotal:       {gib * 1024**2} kB\nNode {number} MemFree: 12 kB\n"
        )
        files[f"{folder}/distance"] = " ".join("10" if n == number else str(far) for n in nodes)
    return files


def process_files(cpus: str, gib: int, allocator: str = "/usr/lib/libc.so.6") -> Files:
    return {
        "proc/self/status": f"Name:\tpython\nCpus_allowed:\tff\nCpus_allowed_list:\t{cpus}\n",
        "proc/self/maps": f"7f00-7f01 r-xp 00000000 08:01 123    {allocator}\n",
        "proc/meminfo": (
            f"MemTotal:       {gib * 1024**2} kB\nMemAvailable:   {gib * 1024**2 // 2} kB\n"
            "SwapTotal:       2097152 kB\nSwapFree:        1048576 kB\n"
            "HugePages_Total:      16\nHugePages_Free:        4\nHugepagesize:       2048 kB\n"
        ),
        "sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never\n",
        "proc/sys/kernel/osrelease": "6.8.0-45-generic\n",
        "dev/null": "",
    }


def x86_cpuinfo(model: str, flags: str, num_cpus: int) -> str:
    return "\n".join(
        f"processor\t: {cpu}\nmodel name\t: {model}\nflags\t\t: {flags}\n"
        for cpu in range(num_cpus)
    )


def private_and_shared(
    cores: Iterable[tuple[int, ...]], l1: str, l2: str, l3: str, l3_groups: Iterable[Iterable[int]]
) -> list[tuple[int, str, str, tuple[int, ...]]]:
    caches: list[tuple[int, str, str, tuple[int, ...]]] = []
    for cpus in cores:
        caches += [(1, "Data", l1, cpus), (1, "Instruction", "32K", cpus), (2, "Unified", l2, cpus)]
    return caches + [(3, "Unified", l3, tuple(sorted(group))) for group in l3_groups]


def xeon() -> Files:
    """2 sockets, 4 cores each, SMT: CPU n and n + 8 are siblings; a node per socket."""
    cores = {core: ((core, core + 8), core // 4) for core in range(8)}
    sides = [{c for cpus, socket in cores.values() if socket == s for c in cpus} for s in (0, 1)]
    pairs = [cpus for cpus, _ in cores.values()]
    return {
        **cpu_files(cores, private_and_shared(pairs, "48K", "2048K", "61440K", sides)),
        **node_files({0: (sides[0], 128), 1: (sides[1], 128)}, far=21),
        **process_files("0-15", 256),
        "proc/cpuinfo": x86_cpuinfo("Intel(R) Xeon(R) Platinum 8480+", XEON_FLAGS, 16),
        "proc/sys/kernel/arch": "x86_64\n",
        "dev/sgx_enclave": "",
    }


def epyc() -> Files:
    """2 sockets with 4 nodes each, 2 cores a node, no SMT; a last-level cache for each node."""
    cores = {core: ((core,), core // 8) for core in range(16)}
    nodes = {n: (range(2 * n, 2 * n + 2), 32) for n in range(8)}
    pairs = [cpus for cpus, _ in cores.values()]
    groups = [cpus for cpus, _ in nodes.values()]
    return {
        **cpu_files(cores, private_and_shared(pairs, "32K", "512K", "16M", groups)),
        **node_files(nodes, far=32),
        **process_files("0-15", 256, "/opt/lib/libtcmalloc_minimal.so.4"),
        "proc/cpuinfo": x86_cpuinfo("AMD EPYC 7601 32-Core Processor", EPYC_FLAGS, 16),
    }


def laptop() -> Files:
    """4 performance cores with SMT (CPUs 0-7) and 4 efficiency cores (8-11), one socket."""
    cores = {core: ((2 * core, 2 * core + 1), 0) for core in range(4)}
    cores |= {core: ((core + 4,), 0) for core in range(4, 8)}
    pairs = [cpus for cpus, _ in cores.values()]
    return {
        **cpu_files(cores, private_and_shared(pairs, "48K", "1280K", "18M", [range(12)])),
        **node_files({0: (range(12), 16)}, far=10),
        **process_files("0-11", 16),
        "sys/devices/cpu_core/cpus": "0-7\n",
        "sys/devices/cpu_atom/cpus": "8-11\n",
        "proc/cpuinfo": x86_cpuinfo("13th Gen Intel(R) Core(TM) i7-1360P", LAPTOP_FLAGS, 12),
    }


def graviton() -> Files:
    """8 Neoverse-V1 cores, no SMT, one node; the kernel gives numbers instead of a model name."""
    cores = {core: ((core,), 0) for core in range(8)}
    pairs = [cpus for cpus, _ in cores.values()]
    cpuinfo = "\n".join(
        f"processor\t: {cpu}\nBogoMIPS\t: 2100.00\nFeatures\t: {GRAVITON_FEATURES}\n"
        "CPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: 0x1\nCPU part\t: 0xd40\n"
        for cpu in range(8)
    )
    capacities = {f"sys/devices/system/cpu/cpu{cpu}/cpu_capacity": "1024" for cpu in range(8)}
    return {
        **cpu_files(cores, private_and_shared(pairs, "64K", "1024K", "32768K", [range(8)])),
        **node_files({0: (range(8), 16)}, far=10),
        **process_files("0-7", 16, "/lib/ld-musl-aarch64.so.1"),
        **capacities,
        "proc/cpuinfo": cpuinfo,
        "sys/class/dmi/id/sys_vendor": "Amazon EC2\n",
        "sys/class/dmi/id/product_name": "c7g.2xlarge\n",
    }


def plain() -> Files:
    """8 CPUs and 16 GiB, and nothing said about cores: enough for limits, and quick to write."""
    return {**process_files("0-7", 16), "sys/devices/system/cpu/online": "0-7\n"}


MACHINES: dict[str, Callable[[], Files]] = {
    "xeon": xeon,
    "epyc": epyc,
    "laptop": laptop,
    "graviton": graviton,
    "plain": plain,
}

WriteTree = Callable[..., Path]


def write_files(root: Path, files: Mapping[str, str | bytes]) -> Path:
    made: set[Path] = set()
    for name, content in files.items():
        path = root / name
        if path.parent not in made:
            path.parent.mkdir(parents=True, exist_ok=True)
            made.add(path.parent)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


@pytest.fixture
def write_tree(tmp_path: Path) -> WriteTree:
    """``write_tree(*parts)``: a new folder with those files; later parts overrule earlier ones.

    A part is a mapping from path to content, or a name of ``MACHINES`` that stands for one.
    """

    def write(*parts: str | Mapping[str, str | bytes]) -> Path:
        files: dict[str, str | bytes] = {}
        for part in parts:
            files.update(MACHINES[part]() if isinstance(part, str) else part)
        root = tmp_path / "tree"
        root.mkdir(exist_ok=True)
        return write_files(root, files)

    return write


@pytest.fixture(scope="session")
def captured(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The tree of a name of ``MACHINES``, written once; not to be changed."""

    @functools.cache
    def root_of(name: str) -> Path:
        return write_files(tmp_path_factory.mktemp(name), MACHINES[name]())

    return root_of


@pytest.fixture
def probe(write_tree: WriteTree, captured: Callable[[str], Path]) -> Callable[..., Machine]:
    """``probe(*parts)``: the machine read from ``write_tree(*parts)``."""

    def probe_tree(*parts: str | Mapping[str, str | bytes]) -> Machine:
        if len(parts) == 1 and isinstance(parts[0], str):
            return Machine.probe(captured(parts[0]))
        return Machine.probe(write_tree(*parts))

    return probe_tree

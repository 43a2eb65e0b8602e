"""The files under ``examples/hosts``: that they are what shell, YAML and Python take."""

import py_compile
import shutil
import subprocess
from pathlib import Path

import pytest

from hotloop.cli.main import build_parser

HOSTS = Path(__file__).parents[2] / "examples" / "hosts"


@pytest.mark.parametrize("name", ["torchrun.sh", "slurm.sbatch"])
def test_shell_files_parse(name: str) -> None:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("needs bash")
    subprocess.run([bash, "-n", str(HOSTS / name)], check=True)


def test_slurm_options_stand_before_the_first_command() -> None:
    lines = (HOSTS / "slurm.sbatch").read_text().splitlines()
    options = [n for n, line in enumerate(lines) if line.startswith("#SBATCH ")]
    first = next(n for n, line in enumerate(lines) if line and not line.startswith("#"))
    assert options
    assert options[-1] < first


def test_ray_file_compiles(tmp_path: Path) -> None:
    py_compile.compile(str(HOSTS / "ray_hosts.py"), cfile=str(tmp_path / "out.pyc"), doraise=True)


def test_kubernetes_job_names_what_is_there() -> None:
    yaml = pytest.importorskip("yaml")
    service, claim, job = yaml.safe_load_all((HOSTS / "kubernetes.yaml").read_text())
    spec = job["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    arguments = container["args"]
    assert spec["completions"] == spec["parallelism"] == int(arguments[0].removeprefix("--nnodes="))
    assert pod["subdomain"] == service["metadata"]["name"]
    assert f"--rdzv-endpoint={job['metadata']['name']}-0.{pod['subdomain']}:29500" in arguments
    assert service["spec"]["selector"].items() <= spec["template"]["metadata"]["labels"].items()
    assert service["spec"]["clusterIP"] == "None"
    claims = [
        v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if "emptyDir" not in v
    ]
    assert claims == [claim["metadata"]["name"]]
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    assert container["resources"]["requests"] == container["resources"]["limits"]
    # The command's own arguments are ones that it takes.
    parsed = build_parser().parse_args(arguments[arguments.index("hotloop") + 1 :])
    assert parsed.auto_resume


@pytest.mark.parametrize("name", ["torchrun.sh", "slurm.sbatch"])
def test_commands_in_shell_files_are_ones_that_hotloop_takes(name: str) -> None:
    text = (HOSTS / name).read_text().replace("\\\n", " ")
    words = text.split("-m hotloop ")[1].split()
    words = [word.strip('"') for word in words if word != '"$@"']
    assert build_parser().parse_args(words).auto_resume

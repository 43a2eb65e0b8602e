#!/usr/bin/env bash
# Makes .venv beside this repository's pyproject.toml and installs the pinned environment into it.
# Run again, it only checks that nothing has changed since.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$root/.venv"
stamp="$venv/.installed"

python=""
for candidate in "${HOTLOOP_PYTHON:-}" python3.11 python3.12 python3.13 python3; do
  [ -n "$candidate" ] || continue
  if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    python="$candidate"
    break
  fi
done
if [ -z "$python" ]; then
  echo "hotloop needs Python 3.11 or newer; found none. Next: install it, or set HOTLOOP_PYTHON to its path." >&2
  exit 2
fi

# The build too: other C++, another library.
built="$(cat "$root/CMakeLists.txt" "$root/src/hotloop/kernels/binding.py" "$root"/src/hotloop/kernels/cpp/* | cksum)"
wanted="$("$python" --version) $(cat "$root/pyproject.toml" "$root/constraints.txt" | cksum) $built $root"
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
  exit 0
fi

echo "hotloop: making the environment in $venv (once, a minute or two)" >&2
rm -f "$stamp"
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  --constraint "$root/constraints.txt" torch scikit-build-core cmake ninja
# The build runs in this environment, so that the pinned tools are the ones used.
PATH="$venv/bin:$PATH" "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  --constraint "$root/constraints.txt" --no-build-isolation \
  --editable "$root[parquet,onnx,openvino,serve,enclave,clients,dev]"
if ! command -v c++ g++ clang++ >/dev/null; then
  echo "hotloop: no C++ compiler, so no kernels of hotloop's own: steps run as PyTorch makes them. Next: install g++ and call this again." >&2
fi
printf '%s' "$wanted" >"$stamp"

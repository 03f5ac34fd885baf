#!/usr/bin/env bash
# Once on a fresh GPU machine: install this checkout, look at what is there, unpack the peers from the carried folder .peers/.
# usage: run("bash tools/gpu/setup.sh", carry=[".peers"])   Some 15 s. The last line is 'setup ok' or says what is missing.
source "$(dirname "$0")/common.sh"
exec > >(tee "$OUT/setup.log") 2>&1

nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit --format=csv,noheader
python3 -m pip install -q --no-deps --no-build-isolation --no-index -e . 2>&1 | grep -v '^WARNING: Running pip as' | tail -5
if ! (cd /tmp && python3 -c 'import pyinfer.core.launch, pyinfer.schedulers, pyinfer.cuda_src') 2>/dev/null; then
    # No usable setuptools: a path file does the same (pyinfer finds schedulers/ and cuda_src/ of a bare checkout beside it).
    say "pip could not install the checkout; using a .pth file instead"
    pwd >"$(python3 -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/pyinfer-checkout.pth"
fi

# What the tests need and the image lacks goes to site-packages (carry it with .peers): tests may not see the peers' folder.
compgen -G '.peers/tests/*.whl' >/dev/null && timeout 120 python3 -m pip install -q --no-index --no-deps --no-compile .peers/tests/*.whl 2>&1 | grep -v '^WARNING: Running pip as' | tail -3

if compgen -G '.peers/*.tar.xz' >/dev/null; then
    mkdir -p "$PYINFER_BENCH_SITE"
    for part in .peers/*.tar.xz; do timeout 120 tar xJf "$part" -C "$PYINFER_BENCH_SITE" && say "unpacked $part"; done
    timeout 120 python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$PYINFER_BENCH_SITE" .peers/*.whl 2>&1 | tail -3
    cp .peers/COMMIT "$PEERS/" 2>/dev/null
    cp "$PYINFER_BENCH_SITE"/flashinfer/data/aot/built/*.json "$PEERS/built/" 2>/dev/null && say "FlashInfer modules built already: $(ls "$PEERS/built")"
fi

timeout 120 python3 - <<'PY'
import importlib, importlib.metadata as md, sys

missing = []
for name in ("numpy numba jinja2 ml_dtypes cupy cuda.core torch triton pytest pytest_timeout xdist hypothesis tokenizers transformers "
             "tqdm einops ninja click requests tabulate pynvml filelock gguf").split():
    try:
        module = importlib.import_module(name)
    except Exception as error:
        missing.append(f"{name} ({type(error).__name__}: {error})")
    else:
        print(f"{name} {getattr(module, '__version__', '?')}", end="  ")
print("\npython", sys.version.split()[0])
import cupy, torch
from pyinfer.core.device import arch_of, cuda_available, device_info

print("torch", torch.__version__, "CUDA", torch.version.cuda, "| cupy NVRTC", cupy.cuda.nvrtc.getVersion(), "| driver", cupy.cuda.runtime.driverGetVersion())
print("pyinfer sees", cuda_available() and (device_info(0), arch_of(0)))
print("setup ok" if not missing else "setup: missing " + ", ".join(missing))
PY

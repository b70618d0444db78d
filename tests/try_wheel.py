"""`make wheel`: what the wheel holds, and that it works where the source tree is not.

python tests/try_wheel.py dist/dsv3_jax-*.whl           # packages are this environment's
python tests/try_wheel.py dist/dsv3_jax-*.whl --fresh   # all packages are installed
"""

import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from pathlib import Path


def main(wheel: Path, fresh: bool) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    foreign = [name for name in names if not name.startswith(("dsv3_jax/", "dsv3_jax-"))]
    assert not foreign, f"{wheel} has {foreign}"
    for suffix in (".cc", ".h", ".js", ".css", ".html", ".json", ".txtpb"):
        assert any(name.endswith(suffix) for name in names), f"{wheel} has no {suffix} files"
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        clean |= {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(home / "cache")}
        venv.create(home / "env")
        python = home / "env/bin/python"
        packages = [] if fresh else ["--no-deps", "--no-index"]
        pip = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-compile"]
        subprocess.run([*pip, *packages, wheel.resolve()], env=clean, check=True)
        # .pth files in the folder that this one names, as of an editable install, are not read
        if not fresh:
            own = next(home.glob("env/lib/python*/site-packages"))
            (own / "borrowed.pth").write_text(sysconfig.get_path("purelib"))
        demo = [home / "env/bin/dsv3", "demo", "--short", "--out", "demo"]
        done = subprocess.run(demo, cwd=home, env=clean, capture_output=True, text=True)
        assert done.returncode == 0, f"exit code {done.returncode}\n{done.stderr[-2000:]}"
        print(done.stdout)
        compiled = list(home.glob("cache/dsv3_jax/*.so"))
        assert compiled, "the C++ kernels were not compiled"
        where = "import dsv3_jax; print(dsv3_jax.__file__, dsv3_jax.__version__)"
        subprocess.run([python, "-c", where], cwd=home, env=clean, check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), "--fresh" in sys.argv)

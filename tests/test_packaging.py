"""Laws of what `pip install` gives: a wheel of the product alone, that works in a clean environment."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("common", "monitor_node", "predictor_node", "trainer_node")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a copy of what git knows, so that leftovers of this folder can neither help nor harm."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    known = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    for name in filter(lambda name: (ROOT / name).is_file(), known):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    # Without isolation: the tools are pinned here, and no network is needed.
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, source]
    subprocess.run(command, check=True, capture_output=True)
    (made,) = folder.glob("*.whl")
    return made


def test_a_wheel_holds_the_product_and_no_tests(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(PACKAGES)
    assert {f"{package}/py.typed" for package in PACKAGES} <= names
    # Everything that belongs to a package here is in it: modules, presets, the page.
    here = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.suffix in {".py", ".toml", ".html", ".js", ".css"}
    }
    assert here - names == set()


def test_in_a_clean_environment_the_commands_and_the_library_work(wheel: Path, tmp_path: Path) -> None:
    home = tmp_path / "env"
    venv.create(home, with_pip=False)
    binaries = home / "bin"
    # What we require is borrowed from here by its path; our own editable install is no plain folder there.
    site = home / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    (site / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(binaries / "python"),
        "install",
        "--no-deps",
        "--quiet",
    ]
    subprocess.run([*pip, "--disable-pip-version-check", "--no-index", wheel], check=True)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    def said(*command: str | Path) -> str:
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        )
        return done.stdout

    for name in ("trainer-node", "predictor-node", "monitor-node"):
        assert "version 0." in said(binaries / name, "--version")
    assert "nano" in said(binaries / "trainer-node", "presets")
    lines = (
        "import torch, common, trainer_node.hybrid as h\n"
        "model = torch.nn.Linear(2, 1)\n"
        "optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n"
        "with h.Hybrid(model, optimizer, redis='memory://', steps=20) as hybrid:\n"
        "    for _ in range(3): hybrid.step(lambda: model(torch.ones(4, 2)).square().mean())\n"
        "print(h.__file__, common.__file__)"
    )
    first, second = said(binaries / "python", "-c", lines).split()
    assert Path(first).is_relative_to(home)
    assert Path(second).is_relative_to(home)


def test_the_api_reference_is_made_of_the_docstrings(tmp_path: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    modules = makefile.split("API := ")[1].split("\ndocs:")[0].replace("\\", " ").split()
    assert "trainer_node.hybrid" in modules
    command = [
        sys.executable,
        "-m",
        "pdoc",
        "--docformat",
        "restructuredtext",
        "--output-directory",
        tmp_path,
    ]
    subprocess.run([*command, *modules], cwd=ROOT, check=True, capture_output=True)
    for module in modules:
        assert (tmp_path / f"{module.replace('.', '/')}.html").is_file()
    page = (tmp_path / "trainer_node" / "hybrid.html").read_text(encoding="utf-8")
    assert "computes the mean loss of batches you hold back from training" in page

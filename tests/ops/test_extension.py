"""How the optional extension is found, refused and left out."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from selm_fast.ops import extension
from tests.ops.cpp_cases import CPP, REQUIRED

ROOT = Path(__file__).parents[2]
in_a_checkout = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs setup.py")


@pytest.mark.skipif(not REQUIRED, reason="SELM_FAST_EXTENSION=1 is not set")
def test_it_is_there_where_it_is_required() -> None:
    assert extension.available(), extension.status()


@CPP
class TestLoaded:
    def test_status_names_torch_and_what_the_processor_runs(self) -> None:
        assert extension.status().startswith(f"it is loaded for torch {torch.__version__}")
        assert all(variant in extension.status() for variant in torch.ops.selm_fast_cpp.variants())

    def test_the_fastest_variant_comes_first_and_one_runs_anywhere(self) -> None:
        order = ["avx512", "avx2", "any"]
        variants = torch.ops.selm_fast_cpp.variants()
        assert variants == [variant for variant in order if variant in variants]
        assert variants[-1] == "any"

    def test_one_of_other_sources_is_refused(self, tmp_path: Path) -> None:
        sources = tmp_path / "csrc"
        sources.mkdir()
        (sources / "rows.cpp").write_text("// newer\n")
        assert isinstance(extension.load(extension.PACKAGE, sources), Path)  # anybody's csrc in site-packages
        (tmp_path / "setup.py").touch()
        problem = extension.load(extension.PACKAGE, sources)
        assert isinstance(problem, str) and "other sources" in problem

    def test_without_sources_there_is_nothing_to_compare(self, tmp_path: Path) -> None:
        library = extension.load(extension.PACKAGE, tmp_path / "csrc")
        assert isinstance(library, Path) and library.name == extension.library()

    def test_one_for_another_torch_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        version = torch.__version__
        monkeypatch.setattr(torch, "__version__", "9.8.7")
        problem = extension.load(extension.PACKAGE, tmp_path / "csrc")
        assert isinstance(problem, str)
        assert f"_C-torch{version}-" in problem and "but this is torch 9.8.7" in problem

    def test_nothing_is_loaded_before_it_is_asked_for(self) -> None:
        program = (
            "import torch, selm_fast.ops as ops\n"
            "assert not torch.ops.loaded_libraries\n"
            "assert ops.extension.available() and len(torch.ops.loaded_libraries) == 1"
        )
        subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


class TestAbsent:
    def test_never_built(self, tmp_path: Path) -> None:
        problem = extension.load(tmp_path, tmp_path / "csrc")
        assert isinstance(problem, str) and problem.startswith("it is not built")

    def test_no_library_at_all(self, tmp_path: Path) -> None:
        (tmp_path / extension.file_name(torch.__version__, "123")).write_bytes(b"no library")
        problem = extension.load(tmp_path, tmp_path / "csrc")
        assert isinstance(problem, str) and problem.startswith(f"_C-torch{torch.__version__}-123.so cannot be loaded: ")

    def test_every_byte_of_the_sources_counts(self, tmp_path: Path) -> None:
        first, second = tmp_path / "a.cpp", tmp_path / "b.h"
        first.write_text("int")
        second.write_text("main")
        digests = [extension.digest_of(tmp_path)]
        second.write_text("Main")
        digests.append(extension.digest_of(tmp_path))
        second.rename(tmp_path / "c.h")
        digests.append(extension.digest_of(tmp_path))
        assert len(set(digests)) == 3
        (tmp_path / "a.cpp.orig").touch()
        assert extension.digest_of(tmp_path) == digests[-1], "what is not compiled does not"

    def test_then_everything_says_so(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(extension, "_problem", lambda: "it is not built")
        assert not extension.available() and not extension.mm_serves(torch.bfloat16)
        assert extension.status() == "it is not built"


@in_a_checkout
class TestSetup:
    """setup.py in a copy of the checkout, where there is no compiler; each run imports torch."""

    @pytest.fixture
    def checkout(self, tmp_path: Path) -> Path:
        for name in ("setup.py", "pyproject.toml", "README.md"):
            shutil.copy(ROOT / name, tmp_path)
        shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
        (tmp_path / "selm_fast" / "ops").mkdir(parents=True)
        shutil.copy(ROOT / "selm_fast" / "__init__.py", tmp_path / "selm_fast")
        shutil.copy(ROOT / "selm_fast" / "ops" / "extension.py", tmp_path / "selm_fast" / "ops")
        return tmp_path

    def build(self, checkout: Path, setting: str | None, before: str = "") -> subprocess.CompletedProcess[str]:
        program = (
            f"{before}\nimport sys, runpy\nsys.argv = ['setup.py', '-q', 'build_ext', '--inplace']\n"
            "runpy.run_path('setup.py')"
        )
        env = {k: v for k, v in os.environ.items() if k != "SELM_FAST_EXTENSION"} | {"CC": "false", "CXX": "false"}
        if setting is not None:
            env["SELM_FAST_EXTENSION"] = setting
        return subprocess.run(
            [sys.executable, "-c", program], cwd=checkout, env=env, capture_output=True, text=True, check=False
        )

    @pytest.mark.parametrize("setting", [None, "1"])
    def test_compilation_fails(self, checkout: Path, setting: str | None) -> None:
        (checkout / "selm_fast" / extension.file_name(torch.__version__, "old")).touch()
        done = self.build(checkout, setting)
        assert (done.returncode == 0) == (setting is None)
        assert done.stderr.count("the C++ extension of csrc/ is not built") == 1
        assert ("SELM_FAST_EXTENSION=1 requires it" in done.stderr) == (setting == "1")
        assert not list(checkout.rglob("*.so")), "what was built from other sources is gone"

    @pytest.mark.parametrize("setting", [None, "1"])
    def test_without_torch(self, checkout: Path, setting: str | None) -> None:
        done = self.build(checkout, setting, before="import sys\nsys.modules['torch'] = None")
        assert (done.returncode == 0) == (setting is None)
        assert "install torch first, then this with --no-build-isolation" in done.stderr

    def test_it_can_be_skipped(self, checkout: Path) -> None:
        done = self.build(checkout, "0")
        assert done.returncode == 0 and "csrc" not in done.stderr

    def test_another_setting_is_refused(self, checkout: Path) -> None:
        done = self.build(checkout, "yes")
        assert done.returncode != 0 and "must be 0 or 1 where it is set; got 'yes'" in done.stderr

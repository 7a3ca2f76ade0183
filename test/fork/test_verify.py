"""Verify fails on what is wrong, with a sentence that says what to do."""

import shutil

import pytest

TEST = "test/srt/test_two.py"


@pytest.fixture(scope="module")
def whole(checked_out, tmp_path_factory):
    """A fork with a series of three that is as it should be; not to be changed."""
    root = tmp_path_factory.mktemp("whole")
    repository = checked_out.copy(root / "a fork é")
    # An environment without PyTorch, which would take most of the time.
    for name in ("torch", "triton", "transformers"):
        (root / f"{name}.py").write_text("raise ImportError\n")
    repository.env = {**repository.env, "PYTHONPATH": str(root)}
    # And with the release that the series is on.
    (root / "sglang-1.0.dist-info").mkdir()
    (root / "sglang-1.0.dist-info/METADATA").write_text("Name: sglang\nVersion: 1.0\n")
    for number in (1, 2, 3):
        text = f"from sglang.srt.model import layers\nnumber = {number}\n"
        repository.commit("srt/new.py", text, f"[Gemma4] Count to {number}")
    repository.describe(one="test/srt/test_one.py", two=TEST, three=TEST)
    repository.fork("export")
    return repository


@pytest.fixture
def repository(whole, tmp_path):
    return whole.copy(tmp_path / "a fork é")


def patch(repository, number: int):
    return next(repository.patches.glob(f"000{number}-*.patch"))


def export(repository, count: int) -> None:
    names = ("one", "two", "three", "four", "five")[:count]
    repository.describe(**dict.fromkeys(names, TEST))
    repository.fork("export")


def test_a_series_as_it_should_be(repository):
    before = repository.contents(repository.root)
    said = repository.fork("verify").splitlines()
    assert said[0] == "The series of 3 applies to sglang==1.0 with git am."
    assert said[-1] == "3/3: 1 modules import."
    assert repository.contents(repository.root) == before
    shutil.rmtree(repository.tree)
    repository.fork("verify")


def test_a_line_changed_by_hand(repository):
    """It applies still, so only its blob's id tells; checked out or not."""
    path = patch(repository, 2)
    path.write_text(path.read_text().replace("+number = 2\n", "+number = 22\n"))
    third = patch(repository, 3)
    third.write_text(third.read_text().replace("-number = 2\n", "-number = 22\n"))
    refusal = repository.refusal("verify")
    assert path.name in refusal and "`make fork` and `make patches`" in refusal
    repository.fork("checkout")
    assert path.name in repository.refusal("verify")
    repository.fork("export")
    repository.fork("verify")


def test_a_line_changed_so_that_it_does_not_apply(repository):
    path = patch(repository, 2)
    path.write_text(path.read_text().replace("-number = 1\n", "-number = one\n"))
    refusal = repository.refusal("verify")
    assert f"{path.name} does not apply: python/sglang/srt/new.py, the hunk" in refusal
    assert "`make fork SERIES=v1.0` stops at it" in refusal


def test_a_message_changed_by_hand(repository):
    path = patch(repository, 3)
    path.write_text(path.read_text().replace("Count to", "Count  to"))
    assert path.name in repository.refusal("verify")


@pytest.mark.parametrize("number", [1, 2])
def test_a_patch_missing_before_another(repository, number):
    patch(repository, number).unlink()
    refusal = repository.refusal("verify")
    assert f"has no patch 000{number}, only 000{number + 1}-" in refusal
    assert "bring it back" in refusal


def test_the_last_patch_missing(repository):
    patch(repository, 3).unlink()
    refusal = repository.refusal("verify")
    assert "has 0003-three.patch in the place of patch 3" in refusal
    assert "patches/v1.0 has nothing" in refusal and "git status patches" in refusal
    repository.describe(one=TEST, two=TEST)
    refusal = repository.refusal("verify")
    assert "Patch 3 of patches/v1.0 is not the commit" in refusal
    assert "Count to 3 of python/sglang (one is missing)" in refusal
    assert "git checkout -- patches" in refusal


def test_a_file_not_exported(repository):
    repository.write("srt/forgotten.py", "x = 1\n")
    refusal = repository.refusal("verify")
    assert "1 uncommitted file (srt/forgotten.py)" in refusal
    assert "`git -C python/sglang commit` and `make patches`" in refusal
    repository.git("add", "--all")
    repository.git("commit", "--quiet", "--message=Add what was forgotten")
    assert "commits. To keep it: `make patches`." in repository.refusal("verify")
    export(repository, 4)
    repository.fork("verify")


def test_a_commit_dropped_and_not_exported(repository):
    repository.git("reset", "--quiet", "--hard", "HEAD~1")
    assert "To keep it: `make patches`." in repository.refusal("verify")


@pytest.mark.parametrize(
    ("test", "reason"),
    [
        ("test/srt/missing.py", "no such file"),
        ("../outside.py", "no such file"),
        ("/etc/hosts", "no such file"),
        ("test/empty", "no such file"),
        ("python/sglang/srt/model.py", "in the patch itself"),
    ],
)
def test_a_test_that_cannot_be(repository, test, reason):
    (repository.root.parent / "outside.py").write_text("")
    (repository.root / "test/empty/__pycache__").mkdir(parents=True)
    settings = repository.patches / "series.toml"
    settings.write_text(settings.read_text().replace("test/srt/test_one.py", test))
    refusal = repository.refusal("verify")
    assert f"series.toml says that {test} tests one" in refusal and reason in refusal


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ('name = "two"', 'name = "one"', "names one more than once"),
        ('name = "two"', 'name = "Two!"', "Two! is no name"),
        ('name = "two"', 'name = "other"', "has 0002-other.patch in the place of"),
        ('topic = "test"\n', "", "missing 1 required positional argument: 'topic'"),
        ('topic = "test"\n', 'topic = ""\n', "an empty or missing string"),
        ('topic = "test"\n', 'topics = ["a"]\n', "unexpected keyword argument"),
        ('version = "1.0+test.2"', "", "KeyError('version')"),
        ('version = "1.0+test.2"', 'version = "?"', "Invalid version: '?'"),
        ('version = "1.0+test.2"', "version =", "TOMLDecodeError"),
        ('result = "none"', 'result = "of-h200"', "results/of-h200.json"),
    ],
)
def test_a_series_toml_that_cannot_be_right(repository, old, new, reason):
    settings = repository.patches / "series.toml"
    text = settings.read_text()
    settings.write_text(text.replace(old, new))
    assert text != settings.read_text()
    refusal = repository.refusal("verify")
    assert "patches/v1.0/series.toml" in refusal and reason in refusal


def test_the_imports_need_the_release(repository, tmp_path):
    """An environment without the engine, or with another release's, proves the rest."""
    info = tmp_path / "sglang-1.0.dist-info"
    info.mkdir()
    path = f"{tmp_path}:{repository.env['PYTHONPATH']}"
    for version, last in (
        ("1.0+test.1", "3/3: 1 modules import."),
        ("1.0.1", "This Python has no sglang==1.0, so the imports are not tried."),
    ):
        (info / "METADATA").write_text(f"Name: sglang\nVersion: {version}\n")
        assert repository.fork("verify", PYTHONPATH=path).splitlines()[-1] == last


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("def (:\n", "does not compile"),
        ("import sglang.srt.missing\n", "No module named 'sglang.srt.missing'"),
        ("raise SystemExit(3)\n", "SystemExit: 3"),
        ("import os\nos.abort()\n", "the interpreter died"),
    ],
)
def test_a_prefix_that_is_broken_though_the_series_is_not(repository, text, reason):
    good = (repository.tree / "srt/new.py").read_text()
    repository.commit("srt/new.py", text, "Break it")
    repository.commit("srt/new.py", good, "Mend it")
    export(repository, 5)
    refusal = repository.refusal("verify")
    assert 'With the first 4 patches, up to "Break it"' in refusal and reason in refusal


def test_two_prefixes_of_one_size_in_one_second(repository):
    """A byte-compiled file that is taken for fresh would hide the second."""
    repository.commit("srt/new.py", "import os  #\n", "Import os")
    repository.commit("srt/new.py", "import no_os\n", "Import what is not there")
    assert len("import os  #") == len("import no_os")
    export(repository, 5)
    assert "No module named 'no_os'" in repository.refusal("verify")


def test_a_module_that_fails_in_the_base_too_is_compiled_only(repository):
    """One that needs a GPU, say, where there is none."""
    repository.commit("srt/gpu.py", "import no_such_gpu  # or this\n", "Say so")
    export(repository, 4)
    said = repository.fork("verify").splitlines()
    assert said[-2] == "4/4: 1 modules import."
    assert said[-1].startswith("Only byte-compiled, as the base fails here too:")
    assert said[-1].endswith(
        "sglang.srt.gpu (ModuleNotFoundError: No module named 'no_such_gpu')."
    )
    repository.commit("srt/gpu.py", "def (:\n", "Break it")
    export(repository, 5)
    assert "srt/gpu.py does not compile" in repository.refusal("verify")


def test_a_module_that_a_patch_makes_importable_has_to_stay_so(repository):
    repository.commit("srt/gpu.py", "x = 1\n", "Need no GPU")
    repository.commit("srt/gpu.py", "import no_such_gpu\n", "Need one again")
    export(repository, 5)
    refusal = repository.refusal("verify")
    assert 'up to "Need one again", sglang.srt.gpu cannot be imported' in refusal

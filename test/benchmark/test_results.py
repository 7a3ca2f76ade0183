"""The results' schema, and that every table in README and docs is what its JSON says."""

import hashlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

from gemma4.cli import main
from gemma4.report import documents, results, tables

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.fixture
def measured():
    found = results.Results.start("kernels", "some", "Some kernel", experts=128)
    for tokens, samples in ((1, [2.0, 1.0, 3.0]), (8192, [1234.5, 1234.5, 1234.5])):
        case = {"tokens": tokens, "dtype": "bfloat16"}
        found.add(case, "torch", "time", "us", samples)
        found.add(case, "fork", "time", "us", [s / 2 for s in samples])
    return found


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_tables_are_what_the_results_say(path):
    text = path.read_text()
    assert documents.fill_in(text) == text, f"run `report tables` on {path.name}"
    assert text.count("<!-- table ") == text.count("<!-- end of table -->")


@pytest.mark.parametrize("path", sorted(results.FOLDER.glob("*.json")), ids=str)
def test_every_result_loads_and_is_shown(path):
    found = results.load(path)
    assert found.name == path.stem
    assert any(f"<!-- table {found.name} " in d.read_text() for d in DOCUMENTS)


def test_a_changed_figure_is_noticed(tmp_path, measured, refused, monkeypatch):
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    monkeypatch.setattr(documents.fill_in, "__defaults__", (tmp_path,))
    measured.save()
    document = tmp_path / "page.md"
    document.write_text(
        "<!-- table some metric=time dtype=bfloat16 -->\n<!-- end of table -->\n"
    )
    assert main(["report", "tables", str(document)]) == 0
    assert "| 1 | 2 | 1 |" in document.read_text()
    assert "| 8192 | 1,234 | 617.2 |" in document.read_text()
    assert main(["report", "tables", "--check", str(document)]) == 0
    document.write_text(document.read_text().replace("617.2", "61.72"))
    said = refused("report tables", "--check", str(document))
    assert "Tables differ from results/" in said


def test_saved_and_loaded_are_equal(tmp_path, measured):
    assert results.load(measured.save(tmp_path / "some.json")) == measured


def distribution(folder: Path, name: str, version: str) -> None:
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")


def test_a_result_knows_its_environment(tmp_path, monkeypatch, capsys):
    """By every distribution, however spelled and in whatever order they lie."""
    listed = []
    for names in ({"B_b.C": "1", "a": "2"}, {"a": "2", "b-b-c": "1"}, {"a": "2.1"}):
        folder = tmp_path / str(len(listed))
        for name, version in names.items():
            distribution(folder, name, version)
        (folder / "gone-1.dist-info").mkdir()
        monkeypatch.setattr(sys, "path", [str(folder)])
        assert main(["report", "environment"]) == 0
        text = capsys.readouterr().out
        found = results.Results.start("kernels", "some", "Some kernel")
        assert found.environment == hashlib.sha256(text.encode()).hexdigest()
        listed.append(text)
    assert listed == ["a==2\nb-b-c==1\n"] * 2 + ["a==2.1\n"]


def test_a_result_from_before_stays_as_it_is(tmp_path, measured):
    measured.environment = ""
    text = measured.save(tmp_path / "some.json").read_text()
    assert "environment" not in text
    path = results.load(tmp_path / "some.json").save(tmp_path / "again.json")
    assert path.read_text() == text


def test_median_and_spread(measured):
    record = measured.get({"tokens": 1, "dtype": "bfloat16"}, "torch", "time")
    assert record.median == 2.0
    assert record.spread == pytest.approx(0.25)


def test_a_column_of_ratios(measured):
    head, _, first, last = tables.table(measured, "time", "torch").splitlines()
    assert head.endswith("| torch | fork | fork / torch |")
    assert first.endswith("| 2 | 1 | 0.50 × |")
    measured.add({"tokens": 7, "dtype": "bfloat16"}, "fork", "time", "us", [1.0])
    assert tables.table(measured, "time", "torch").splitlines()[-1].endswith("| 1 |  |")


def test_samples_are_appended(measured):
    case = {"tokens": 80, "dtype": "bfloat16"}
    for sample in (3, 1.0, 2.0):
        measured.append(case, "fork", "time", "us", sample)
    assert measured.get(case, "fork", "time").samples == [3.0, 1.0, 2.0]


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path, measured):
    path = measured.save(tmp_path / "some.json")
    before = path.read_bytes()
    measured.settings["unwritable"] = object()
    with pytest.raises(TypeError):
        measured.save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "content, words",
    [
        ("{", "is not JSON"),
        ("[]", "must have schema 1"),
        ('{"schema": 2}', "must have schema 1, got 2"),
        ('{"schema": 1}', "is not a result of schema 1"),
    ],
)
def test_what_is_no_result_is_refused(tmp_path, content, words):
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=words):
        results.load(path)


def test_a_record_is_added_once(measured):
    case = {"tokens": 1, "dtype": "bfloat16"}
    with pytest.raises(ValueError, match="recorded already"):
        measured.add(case, "fork", "time", "us", [1.0])


def test_the_plot_is_an_svg(tmp_path, measured):
    path = measured.save(tmp_path / "some.json")
    assert main(["report", "plot", str(path), "--out", str(tmp_path)]) == 0
    (picture,) = tmp_path.glob("*.svg")
    assert "<svg" in picture.read_text()[:1000]

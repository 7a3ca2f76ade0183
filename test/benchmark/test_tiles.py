"""The picture of the tiles that the extend kernel walks."""

from pathlib import Path

from programs import run

PICTURE = Path(__file__).parents[2] / "docs" / "img" / "prefill-tiles.svg"


def draw(*arguments):
    return run("report", "tiles", *arguments)


def test_the_picture_is_the_one_in_the_docs(tmp_path):
    done = draw("--out", tmp_path / "tiles.svg")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "tiles.svg").read_bytes() == PICTURE.read_bytes()


def test_counts(tmp_path):
    """8 x 8 tiles of one token, a window of two keys: counted by hand."""
    done = draw(
        *("--out", tmp_path / "tiles.svg", "--tokens", 8, "--window", 2),
        *("--block-m", 1, "--block-n", 1),
    )
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "tiles.svg").read_text()
    assert "0.5.12.post1: 36 tiles" in text
    assert "fork: 21 tiles" in text


def test_tokens_that_no_tile_divides(tmp_path):
    done = draw("--out", tmp_path / "tiles.svg", "--tokens", 100)
    assert done.returncode == 2
    assert "is no multiple of both block sizes" in done.stderr
    assert not (tmp_path / "tiles.svg").exists()

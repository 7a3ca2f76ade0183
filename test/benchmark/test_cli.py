"""The door: every command is behind it, and says what it takes."""

import pytest
from gemma4.cli import COMMANDS, main


@pytest.mark.parametrize("name", COMMANDS)
def test_each_option_is_explained_by_a_sentence(name, capsys):
    with pytest.raises(SystemExit) as end:
        main([*name.split(), "--help"])
    assert not end.value.code
    said = capsys.readouterr().out
    assert said.startswith(f"usage: python -m gemma4 {name}")
    options = said.partition("options:\n")[2].split("\n  -")[1:]
    assert all(option.rstrip().endswith(".") for option in options), options


@pytest.mark.parametrize(
    "arguments, status",
    [(["--help"], 0), (["kernel", "-h"], 0), (["no-such"], 2), ([], 2)],
)
def test_the_commands_are_listed(arguments, status, capsys):
    assert main(arguments) == status
    said = capsys.readouterr()
    for name in COMMANDS:
        group = arguments[0] == "kernel" if arguments else False
        listed = f"    {name} " in said.out + said.err
        assert listed == (not group or name.startswith("kernel"))


def test_what_is_wrong_is_said_in_one_line(refused):
    said = refused("report plot", "no-such.json")
    assert "no-such.json" in said
    with pytest.raises(SystemExit) as end:
        main(["train"])
    assert end.value.code == 2

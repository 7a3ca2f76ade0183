"""The numbers that every model with sliding windows gives its layers and the model
runner, against transformers' own masks. The table is in `window_models.py`.
"""

import ast
import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import window_models
from window_models import MODELS

import sglang
from sglang.test.ci.ci_register import register_cpu_ci, register_cuda_ci

register_cpu_ci(est_time=120, suite="stage-a-test-cpu")
register_cuda_ci(est_time=120, suite="stage-b-test-1-gpu-small")

# Classes of a file with windows that take theirs from the class of one in the table.
SAME = {
    "DFlash2BeamDraftModel": "DFlashDraftModel",
    "DFlash2DraftModel": "DFlashDraftModel",
    "DFlashLagunaForCausalLM": "DFlashDraftModel",
    "Dots3NoteForCausalLMNextN": "Dots3LanguageModelForCausalLM",
    "Lfm2DSparkDraftModel": "DFlashDraftModel",
    "LiLiCorrDraftModel": "DFlashDraftModel",
    "LingDSparkModel": "DFlashDraftModel",
    "MiniMaxDFlash2DraftModel": "DFlashDraftModel",
    "MuseGlimmerAssistantModel": "DFlashDraftModel",
    "NemotronHForCausalLMMTP": "NemotronHForCausalLM",
    "NemotronHPuzzleForCausalLM": "NemotronHForCausalLM",
    "Qwen3DSparkModel": "DFlashDraftModel",
    "TransformersEmbeddingModel": "TransformersBase",
    "TransformersForSequenceClassification": "TransformersBase",
    "TransformersMoEEmbeddingModel": "TransformersBase",
    "TransformersMoEForCausalLM": "TransformersBase",
    "TransformersMoEForSequenceClassification": "TransformersBase",
    "TransformersMultiModalEmbeddingModel": "TransformersBase",
    "TransformersMultiModalForCausalLM": "TransformersBase",
    "TransformersMultiModalForSequenceClassification": "TransformersBase",
    "TransformersMultiModalMoEEmbeddingModel": "TransformersBase",
    "TransformersMultiModalMoEForCausalLM": "TransformersBase",
    "TransformersMultiModalMoEForSequenceClassification": "TransformersBase",
}
# Those that hold a model with windows and have no number of their own: the layers are
# that model's, and the runner's number is the layers'.
HOLDS = {
    "InternS1ForConditionalGeneration",
    "InternVLChatModel",
    "JetVLMForConditionalGeneration",
    "NemotronH_Nano_Omni_Reasoning_V3",
    "NemotronH_Nano_VL_V2",
    "NemotronH_Omni_Reasoning_V3",
    "Step3p7ForConditionalGeneration",
}
# Those whose windows the Triton backend does not read, and why.
ELSEWHERE = {
    "DeepseekV4ForCausalLMDSpark": "a draft of DeepSeek V4's own backends",
    "GraniteMoeHybridForCausalLM": "takes the experts of GraniteMoE, not its attention",
    "UnlimitedOCRForCausalLM": "keeps its prompt, in FlashAttention's page table alone",
}

SOURCES = Path(sglang.__file__).parent / "srt" / "models"
GIVES_A_WINDOW = re.compile(
    r"\bsliding_window_size=|\.sliding_window_size = |"
    r"def get_attention_sliding_window_size"
)


@cache
def parsed(module):
    """The classes that a module of models registers, those it takes from others of
    them, by module, and whether it gives a window to a layer or to the runner."""
    path = SOURCES.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    text = path.read_text()
    registered, taken = [], {}
    for node in ast.walk(ast.parse(text)):
        if (
            isinstance(node, ast.Assign)
            and ast.unparse(node.targets[0]) == "EntryClass"
        ):
            registered = [n.id for n in ast.walk(node.value) if isinstance(n, ast.Name)]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
            "sglang.srt.models."
        ):
            source = node.module.removeprefix("sglang.srt.models.")
            names = [a.name for a in node.names if re.match("[A-Z].*[a-z]", a.name)]
            if names:
                taken.setdefault(source, []).extend(names)
    return registered, taken, bool(GIVES_A_WINDOW.search(text))


def reached(module, seen):
    if module not in seen:
        seen.add(module)
        for source in parsed(module)[1]:
            reached(source, seen)
    return seen


def registered():
    """Every registered class, the module it is in, and whether any that it is made of
    gives windows."""
    for path in sorted(SOURCES.rglob("*.py")):
        module = ".".join(path.relative_to(SOURCES).with_suffix("").parts)
        if path.name != "__init__.py":
            for name in parsed(module)[0]:
                yield name, module, any(parsed(m)[2] for m in reached(module, set()))


def test_every_registered_model_with_a_window_is_known():
    windowed = {name for name, _, gives in registered() if gives}
    known = {*MODELS, *SAME, *HOLDS, *ELSEWHERE}
    assert len(windowed) > 60
    assert sorted(windowed - known) == []
    everything = {name for name, *_ in registered()}
    assert sorted(known - windowed - everything) == []


@cache
def built():
    """What each model of the table got, built in a process of its own."""
    needed = {
        module.split(".")[0] for name, module, _ in registered() if name in MODELS
    }
    others = {path.stem for path in SOURCES.glob("*.py")} - needed
    env = dict(
        os.environ,
        OMP_NUM_THREADS="1",
        HF_HUB_OFFLINE="1",
        SGLANG_DISABLED_MODEL_ARCHS=",".join(sorted(others)),
    )
    env.pop("SGLANG_USE_CPU_ENGINE", None)  # which some of the models do not know
    done = subprocess.run(
        [sys.executable, window_models.__file__],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", MODELS)
def test_a_layer_and_the_runner_get_what_transformers_masks(name):
    found = built()[name]
    assert "error" not in found, found["error"]
    assert found["built"] == name
    if MODELS[name].windows:
        # A layer's number, and the runner's, do not count the token itself.
        windows = {size for size in found["layers"] if size != -1}
        assert {size + 1 for size in windows} == {found["keys"]}
        assert found["runner"] + 1 == found["keys"]
    else:
        assert found["layers"] == [-1]
        assert found["runner"] is None


@pytest.mark.parametrize("name", SAME)
def test_a_class_takes_its_window_from_the_one_in_the_table(name):
    """Shown by the source, for a class itself would need more of a config."""
    modules = {owner: module for owner, module, _ in registered()}
    seen, todo = set(), [(name, modules[name])]
    while todo:
        owner, module = todo.pop()
        tree = ast.parse(
            SOURCES.joinpath(*module.split(".")).with_suffix(".py").read_text()
        )
        classes = {n.name: n for n in tree.body if isinstance(n, ast.ClassDef)}
        if owner not in classes:
            todo += [
                (owner, m) for m, names in parsed(module)[1].items() if owner in names
            ]
            continue
        seen.add(owner)
        if owner != SAME[name]:
            assert "sliding_window" not in ast.unparse(classes[owner])
            todo += [(ast.unparse(base), module) for base in classes[owner].bases]
    assert SAME[name] in seen


@pytest.mark.parametrize("name", sorted(HOLDS))
def test_a_model_that_holds_another_has_no_number(name):
    (module,) = [module for owner, module, _ in registered() if owner == name]
    assert not parsed(module)[2]


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))

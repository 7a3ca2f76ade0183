"""LoRA on Gemma 4 over HTTP, on the CPU engine in float32: what an adapter answers is
what transformers does with the adapter's product added to the weights."""

import contextlib
import importlib.util
import json
import unittest
from pathlib import Path

import requests
import torch
from safetensors.torch import save_file

from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

spec = importlib.util.spec_from_file_location(
    "gemma4_parity", Path(__file__).parents[1] / "models" / "test_gemma4_parity.py"
)
parity = importlib.util.module_from_spec(spec)
spec.loader.exec_module(parity)

register_cpu_ci(est_time=120, suite="stage-a-test-cpu")

# Of an answer.
parity.NEW_TOKENS = 12
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Of each adapter its modules, rank, alpha and layers, all of them if None.
ADAPTERS = {
    "all": (MODULES, 4, 8, None),
    "q": (("q_proj",), 2, 4, None),
    "k": (("k_proj",), 3, 6, None),
    "v-up": (("v_proj", "up_proj"), 4, 8, None),
    "k-gate": (("k_proj", "gate_proj"), 1, 2, None),
    "o-down": (("o_proj", "down_proj"), 4, 2, [1, 2]),
    "qv": (("q_proj", "v_proj"), 4, 4, None),
}


def language_layers(model):
    """Name of the decoder layers in transformers, and the layers."""
    for name in ("model.language_model.layers", "model.layers"):
        with contextlib.suppress(AttributeError):
            return name, model.get_submodule(name)
    raise AssertionError("no decoder layers")


def draw(model, name):
    """Weights of an adapter by PEFT's names, and what each adds to a parameter."""
    modules, rank, alpha, layers = ADAPTERS[name]
    generator = torch.Generator().manual_seed(sum(name.encode()))
    weights, deltas = {}, {}
    prefix, decoder = language_layers(model)
    for i, layer in enumerate(decoder):
        if layers is not None and i not in layers:
            continue
        for path, linear in layer.named_modules():
            if path.split(".")[0] not in ("self_attn", "mlp"):
                continue
            if path.split(".")[-1] not in modules or linear is None:
                continue
            out, width = linear.weight.shape
            a = torch.randn(rank, width, generator=generator) * width**-0.5
            b = torch.randn(out, rank, generator=generator) * 0.4 * rank**-0.5
            key = f"base_model.model.{prefix}.{i}.{path}"
            weights[f"{key}.lora_A.weight"] = a
            weights[f"{key}.lora_B.weight"] = b
            deltas[linear.weight] = alpha / rank * b @ a
    return weights, deltas


def write_adapter(folder: Path, weights, modules, rank, alpha):
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": list(modules),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


def setUpModule():
    parity.setUpModule()


def tearDownModule():
    parity.tearDownModule()


class Adapted(parity.Served):
    dtype = "float32"

    @classmethod
    def setUpClass(cls):
        config = json.loads(Path(cls.path(), "config.json").read_text())
        model_class = getattr(parity.transformers, config["architectures"][0])
        model = model_class.from_pretrained(cls.path(), dtype=torch.float32)
        folder = Path(parity.FOLDERS) / f"adapters-{cls.folder}"
        folder.mkdir()
        for name, (modules, rank, alpha, _) in ADAPTERS.items():
            write_adapter(folder / name, draw(model, name)[0], modules, rank, alpha)
        cls.adapters = folder
        cls.server_args = [
            *parity.ROOMY,
            *("--lora-backend", "torch_native", "--max-loras-per-batch", "4"),
            "--lora-paths",
            *(f"{name}={folder / name}" for name in ADAPTERS),
        ]
        super().setUpClass()

    @contextlib.contextmanager
    def merged(self, name):
        """transformers' model with an adapter's product in its weights."""
        deltas = {} if name is None else draw(self.oracle, name)[1]
        with torch.no_grad():
            before = {weight: weight.clone() for weight in deltas}
            for weight, delta in deltas.items():
                weight += delta
            yield
            for weight, value in before.items():
                weight.copy_(value)

    def ask(self, prompts, names):
        response = requests.post(
            f"{self.base_url}/generate",
            json={
                "input_ids": prompts,
                "lora_path": names,
                "sampling_params": {
                    "temperature": 0,
                    "max_new_tokens": parity.NEW_TOKENS,
                    "ignore_eos": True,
                },
                "return_logprob": True,
                "logprob_start_len": 0,
            },
            timeout=300,
        )
        self.assertEqual(response.status_code, 200, response.text)
        return response.json()

    def check_all(self, names, lengths):
        prompts = [parity._prompt(n, seed=i) for i, n in enumerate(lengths)]
        for name, prompt, answer in zip(names, prompts, self.ask(prompts, names)):
            with self.merged(name):
                self.check(str(name), prompt, answer)

    def test_alone(self):
        """Of one prompt the adapters give different answers."""
        prompt = parity._prompt(2 * parity.WINDOW)
        answers = set()
        for name in (None, *ADAPTERS):
            [answer] = self.ask([prompt], [name])
            with self.subTest(name), self.merged(name):
                self.check(str(name), prompt, answer)
            answers.add(tuple(answer["output_ids"]))
        self.assertEqual(len(answers), 1 + len(ADAPTERS))

    def test_together(self):
        """More adapters than a batch takes, and none, in one request."""
        names = [None, *ADAPTERS, "q", None, "all"]
        self.check_all(names, [3, 40, 5, 17, 60, 9, 33, 21, 5, 1, 12])


class TestGemma4LoRA(Adapted, CustomTestCase):
    folder = "multimodal"

    def load(self, name, weights, modules):
        write_adapter(self.adapters / name, weights, modules, 2, 2)
        return requests.post(
            f"{self.base_url}/load_lora_adapter",
            json={"lora_name": name, "lora_path": str(self.adapters / name)},
            timeout=60,
        )

    def test_refused(self):
        """By name, and the server goes on."""
        full = self.oracle.config.text_config.layer_types.index("full_attention")
        for i, key in enumerate(
            (
                "vision_tower.encoder.layers.0.self_attn.q_proj.linear",
                "language_model.layers.0.experts.gate_up_proj",
                "language_model.layers.0.router.proj",
                "language_model.embed_tokens",
                f"language_model.layers.{full}.self_attn.v_proj",
            )
        ):
            with self.subTest(key):
                name = f"base_model.model.model.{key}"
                weights = {
                    f"{name}.lora_A.weight": torch.zeros(2, 8),
                    f"{name}.lora_B.weight": torch.zeros(8, 2),
                }
                response = self.load(f"refused-{i}", weights, ["q_proj"])
                self.assertEqual(response.status_code, 400, response.text)
                self.assertIn(f"{name}.lora_A", response.text)
        self.check_all([None, "q"], [5, 5])


if __name__ == "__main__":
    unittest.main()

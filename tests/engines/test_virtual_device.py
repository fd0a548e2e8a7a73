"""Decoding on virtual CUDA devices: the tokens of the CPU, without mix-ups of devices and with few waits of the host."""

import copy
from contextlib import nullcontext
from itertools import product

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

import tspo_trl.engines.decoding
from helpers.limits import LIMITS
from helpers.virtual_device import VirtualCuda
from tspo_trl import SearchAgent, SearchConfig
from tspo_trl.engines.shared_prefix import _HAS_FLOAT_RESULT, attend
from tspo_trl.engines.static import TransformersEngine
from tspo_trl.support.devices import default_device, get_rng_state, set_rng_state

SAMPLING = {
    "greedy": None,
    "sampled": {"temperature": 1.0},
    "truncated": {"temperature": 0.8, "top_p": 0.9, "top_k": 20, "min_p": 0.01, "repetition_penalty": 1.1},
}


@pytest.fixture
def deterministic():
    """As with `full_determinism=True`."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def load(policy_dir, **options):
    return AutoModelForCausalLM.from_pretrained(policy_dir, dtype=torch.float32, **options).eval()


@pytest.fixture(scope="module")
def prompts(world):
    """Groups of rollouts, without a common beginning, and with one that is stored once."""
    texts = [str(question.row()["prompt"]) for question in world.train_questions[:3] for _ in range(2)]
    common = "the author of a novel by the English author " * 8 + "\n"
    return {"alone": texts, "shared": [common + text for text in texts]}


def roll_out(model, tokenizer, retriever, texts, sampling):
    config = SearchConfig(max_completion_length=160, **LIMITS)
    agent = SearchAgent.from_model(model, tokenizer, retriever=retriever, config=config, sampling=sampling)
    torch.manual_seed(3)
    return [trajectory.completion_ids for trajectory in agent.rollout_prompts(texts)]


def test_the_device_refuses_what_cuda_refuses():
    with VirtualCuda(2):
        ours, host = torch.arange(3.0, device="cuda"), torch.arange(3.0)
        for mixed in (
            lambda: ours + host,
            lambda: ours + host.to("cuda:1"),
            lambda: torch.cat([ours, host]),
            lambda: host[torch.tensor([0], device="cuda")],
            lambda: ours.masked_fill(torch.tensor([True, False, True]), 0.0),
            lambda: host.add_(ours),
        ):
            with pytest.raises(RuntimeError, match="on the same device"):
                mixed()
        with pytest.raises(TypeError, match=r"Use Tensor\.cpu"):
            ours.numpy()
        with pytest.raises(RuntimeError, match="invalid device ordinal"):
            torch.zeros(1, device="cuda:2")
        assert (ours + torch.tensor(1.0)).device == torch.device("cuda:0")
        assert ours[torch.tensor([0, 2])].tolist() == [0.0, 2.0]
        assert ours.cpu().device.type == "cpu"
    assert not torch.cuda.is_available()


def test_gradients_are_those_of_the_cpu():
    torch.manual_seed(0)
    reference = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    batch = torch.randn(5, 3)
    reference(batch).square().mean().backward()
    with VirtualCuda():
        model = copy.deepcopy(reference).to("cuda")
        model.zero_grad()
        model(batch.cuda()).square().mean().backward()
        for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
            assert ours.grad.is_cuda
            assert torch.equal(ours.grad.cpu(), theirs.grad)


@pytest.mark.parametrize(
    ("kind", "name", "devices"),
    [*product(["alone", "shared"], SAMPLING, [1]), ("alone", "truncated", 2), ("shared", "sampled", 2)],
)
def test_rollouts_equal_those_of_the_cpu(policy_dir, tokenizer, retriever, prompts, kind, name, devices):
    expected = roll_out(load(policy_dir), tokenizer, retriever, prompts[kind], SAMPLING[name])
    with VirtualCuda(devices):
        model = load(policy_dir, device_map="cuda:0" if devices == 1 else "auto")
        assert {parameter.device.index for parameter in model.parameters()} == set(range(devices))
        assert roll_out(model, tokenizer, retriever, prompts[kind], SAMPLING[name]) == expected


@pytest.mark.parametrize("name", ["sampled", "truncated"])
def test_rollouts_with_deterministic_algorithms_only(policy_dir, tokenizer, retriever, prompts, name, deterministic):
    expected = roll_out(load(policy_dir), tokenizer, retriever, prompts["shared"], SAMPLING[name])
    with VirtualCuda():
        with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
            torch.rand(2, 3, device="cuda").cumsum(dim=1)
        model = load(policy_dir, device_map="cuda:0")
        assert roll_out(model, tokenizer, retriever, prompts["shared"], SAMPLING[name]) == expected


def test_a_mix_up_is_found_with_its_place(policy_dir, tokenizer, retriever, prompts, monkeypatch):
    sample = tspo_trl.engines.decoding.sample
    monkeypatch.setattr(tspo_trl.engines.decoding, "sample", lambda scores, uniform: sample(scores, uniform.cpu()))
    with VirtualCuda(), pytest.raises(RuntimeError, match=r"on the same device.* at engines/sampling\.py:"):
        roll_out(load(policy_dir, device_map="cuda:0"), tokenizer, retriever, prompts["alone"], SAMPLING["sampled"])


@pytest.mark.parametrize("kind", ["alone", "shared"])
def test_the_host_waits_once_for_each_token(policy_dir, tokenizer, prompts, kind):
    """It reads the tokens, to see which turns have ended. What layers share is computed once for each token."""
    contexts = [tokenizer(text)["input_ids"][: -1 - i] for i, text in enumerate(prompts[kind])]
    tokens = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": None}
    config = GenerationConfig(do_sample=True, temperature=0.7, top_k=0, disable_compile=True, **tokens)
    waits, launches = [], []
    for budget in (10, 20):
        with VirtualCuda() as cuda:
            model = load(policy_dir, device_map="cuda:0")
            engine = TransformersEngine(lambda model=model: nullcontext(model), tokenizer, config, ())
            cuda.waits.clear()
            cuda.launches.clear()
            with engine.session():
                engine.generate(contexts, [budget] * len(contexts))
            waits.append(sum(cuda.waits.values()))
            launches.append(cuda.launches.copy())
    assert waits[1] - waits[0] == 10
    more = {name: (count - launches[0][name]) / 10 for name, count in launches[1].items()}
    assert more.get("aten.bitwise_not", 0) == (1 if kind == "shared" else 0)
    assert more["aten.copy_"] == 2 * model.config.num_hidden_layers + 1  # keys, values and the tokens
    assert more.get("aten.index_put_", 0) == 0


@pytest.mark.skipif(not _HAS_FLOAT_RESULT, reason="`torch.bmm` has no `out_dtype` before PyTorch 2.8")
@pytest.mark.parametrize("cast", [False, True])
def test_attention_in_half_precision_converts_no_keys(cast):
    torch.manual_seed(0)
    rows, heads, groups, shared, own, size = 5, 6, 2, 40, 70, 16
    query = torch.randn(rows, heads, 1, size).bfloat16()
    prefix = torch.randn(2, 1, groups, shared, size).bfloat16().unbind()
    key, value = torch.randn(2, rows, groups, own, size).bfloat16().unbind()
    hidden = torch.arange(own) < torch.arange(rows)[:, None, None, None]
    expected = attend(query, prefix, key, value, hidden, 0.3)
    with VirtualCuda(memory=True) as cuda:
        inputs = [part.to("cuda") for part in (query, *prefix, key, value, hidden)]
        converted = []
        count = cuda._count

        def note(packet, args, *rest):
            if packet is torch.ops.aten._to_copy:
                converted.append(args[0].numel())
            count(packet, args, *rest)

        cuda._count = note
        with torch.autocast("cuda", torch.bfloat16, enabled=cast):
            result = attend(inputs[0], (inputs[1], inputs[2]), *inputs[3:], 0.3)
        assert result.dtype == torch.bfloat16
        assert max(converted) <= rows * heads * (shared + own)  # the weights, not keys and values
        assert key.numel() > rows * heads * (shared + own)
        torch.testing.assert_close(result.cpu(), expected, atol=1e-2, rtol=0)


def test_each_device_has_a_random_generator_that_is_restored():
    with VirtualCuda(2):
        device = default_device()
        assert device.type == "cuda"
        states = get_rng_state(device)
        drawn = [torch.rand(3, device=place).tolist() for place in ("cuda:0", "cuda:1", "cpu")]
        set_rng_state(device, states)
        assert [torch.rand(3, device=place).tolist() for place in ("cuda:0", "cuda:1", "cpu")] == drawn
        assert drawn[0] != drawn[1] != drawn[2]

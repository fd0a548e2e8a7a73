"""The peak memory of a GPU in training, calculated from the shape of the model before training.

    tspo memory --config recipes/configs/qwen2.5_3b_nq_hotpotqa.yaml --strategy zero3 --gpus 8
    tspo memory --model Qwen/Qwen2.5-7B --dtype bfloat16 --use_peft --load_in_4bit --gpu_memory 24
    tspo memory --model_type qwen2 --hidden_size 2048 --num_hidden_layers 36 --vocab_size 151936 ...

Parameters, gradients and optimizer states are exact. The cache, activations and buffers are approximate; the context of
CUDA, fragmentation and the workspaces of libraries are not included (often 1 to 3 GiB): leave 20 % of a card free.
"""

import argparse
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING as MODEL_TYPES
from transformers import AutoConfig, AutoModelForCausalLM, Cache, HfArgumentParser, PreTrainedConfig

from ..engines.kv_cache import cache_name, new_cache
from ..engines.layers import growing_layers, state_layers, window_layers
from ..support.markdown import markdown_table
from ..support.paths import check_model_path
from .formulas import (
    GIB,
    MemorySetting,
    ModelShape,
    Precision,
    activation_bytes,
    decoding_bytes,
    head_bytes,
    keeps_cache,
    kv_cache_bytes,
    precision,
    state_bytes,
    vllm_rollouts,
)

PHASES = ("generation", "loss: LM head", "loss: layers", "optimizer step")
CARDS = (24, 40, 80, 141)
HEADROOM = 0.8  # usable share of a card; the rest is for memory that is not calculated
# The numbers that every model needs, and what `transformers` raises if numbers do not fit together
_COUNTED = (
    *("hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim"),
)
_NO_MODEL = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError, StrictDataclassError)
BUCKET, LIVE = 500_000_000, 1_000_000_000  # elements; DeepSpeed's `reduce_bucket_size`, `stage3_max_live_parameters`


def load_config(model: str | None, model_type: str = "llama", **numbers: Any) -> PreTrainedConfig:
    """Load the configuration of a model (a folder or a name on the Hub), or make one of an architecture with these numbers."""
    if (model is None) != bool(numbers):
        found = "neither" if model is None else f"{model!r} and {sorted(numbers)}"
        raise ValueError(f"Give either `model` or the numbers of its shape (`hidden_size`, …), got {found}.")
    if model is None:
        try:
            default = AutoConfig.for_model(model_type)
        except ValueError as error:
            raise ValueError(f"`model_type` must be an architecture of `transformers`, got {model_type!r}.") from error
        if unknown := sorted(name for name in numbers if not hasattr(default, name)):
            names = [*default.to_dict(), *(field.name for field in fields(MemorySetting))]
            raise ValueError(
                f"Options must be those of the command or of a configuration of {model_type!r}, got {unknown}."
                f"{nearest(unknown[0], names)}"
            )
        for name, value in numbers.items():
            counted = name in _COUNTED and isinstance(getattr(default, name), int)
            if counted and value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"`{name}` must be a whole number of at least 1, got {value!r}.")
        try:
            return AutoConfig.for_model(model_type, **numbers)
        except _NO_MODEL as error:
            raise ValueError(f"{model_type!r} allows no model with {numbers}. ({error})") from error
    check_model_path(model)
    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, *_NO_MODEL) as error:
        raise ValueError(
            f"`model` must be a folder with a config.json, or a name on the Hub that can be reached or was loaded "
            f"before, got {model!r}. Or give its numbers: `hidden_size`, … ({str(error).splitlines()[0]})"
        ) from error


def nearest(name: str, names: Iterable[str], prefix: str = "") -> str:
    """The question whether another name was meant, if one is similar."""
    near = get_close_matches(name.replace("-", "_"), list(names), n=1)
    return f" Did you mean {prefix}{near[0]}?" if near else ""


def read_run(path: str, known: Collection[str] | None) -> dict[str, Any]:
    """The values of the YAML file of a run. Keys that are not known are refused."""
    with Path(path).open("rb") as file:  # an error of YAML names the file
        values = yaml.safe_load(file)
    if not isinstance(values, dict):
        raise ValueError(f"{path} must contain a YAML mapping, for instance `num_generations: 8`.")
    values = {str(key).replace("-", "_"): value for key, value in values.items()}
    if "model" in values:  # as in the flags
        values.setdefault("model_name_or_path", values.pop("model"))
    if isinstance(values.get("lora_target_modules"), str):
        values["lora_target_modules"] = [values["lora_target_modules"]]
    names = {field.name for field in fields(MemorySetting)} | set(known or ())
    for key in values if known is not None else ():
        if key not in names:
            raise ValueError(f"{path}: unknown option `{key}`.{nearest(key, names)}")
    return values


def _read_value(name: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"--{name} must be a number or another value of YAML, got {text!r}.") from error


def measure_shape(config: PreTrainedConfig, setting: MemorySetting) -> ModelShape:
    """Build the model and its adapters on the `meta` device, which takes no memory, and count parameters."""
    try:
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config)
    except _NO_MODEL as error:
        raise ValueError(
            f"`transformers` can make no model of this configuration of {config.model_type!r}. ({error})"
        ) from error
    base = sum(p.numel() for p in model.parameters())
    head = model.get_output_embeddings()
    tied = head.weight is model.get_input_embeddings().weight
    linear = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head}
    blocks = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    inside = sum(p.numel() for p in blocks.parameters())
    query_key_norm = any(n.endswith("q_norm") for n, _ in model.named_modules())
    network, trainable, adapter_inputs = model, base, 0
    if setting.use_peft:
        model = _add_adapters(model, setting, {n.rsplit(".", 1)[-1] for n in linear})
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        adapted = [m for n, m in model.named_modules() if n.endswith("lora_A.default")]
        adapter_inputs = sum(m.in_features for m in adapted) // len(blocks)
    cache = new_cache(network)
    text = config.get_text_config()
    heads = text.num_attention_heads
    experts = getattr(text, "num_experts_per_tok", None)
    intermediate = getattr(text, "moe_intermediate_size", None) if experts else None
    return ModelShape(
        layers=len(blocks),
        hidden=text.hidden_size,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        intermediate=(intermediate or getattr(text, "intermediate_size", 4 * text.hidden_size)) * (experts or 1),
        vocab=text.vocab_size,
        query_key_norm=query_key_norm,
        base=base,
        trainable=trainable,
        head=head.weight.numel(),
        outside=base - inside,
        linear=sum(m.weight.numel() for m in linear.values()),
        largest=max(m.weight.numel() for m in linear.values()),
        tied=tied,
        adapter_inputs=adapter_inputs,
        movable_cache=cache is not None,
        windows=cache is not None and bool(window_layers(cache)),
        cached_layers=len(blocks) if cache is None else len(growing_layers(cache)),
        states=0 if cache is None else _count_states(network, cache),
    )


def _count_states(model: Any, cache: Cache) -> int:
    """Elements of the states of recurrent layers, for one row. The first such layer shows the shape of all."""
    layers = state_layers(cache)
    if layers:
        ids = torch.zeros(1, 2, dtype=torch.long, device="meta")
        with torch.no_grad(), suppress(RuntimeError):  # not every layer runs on the `meta` device
            model(input_ids=ids, use_cache=True, **{cache_name(model): cache})
    count = len(layers)
    kinds = getattr(model.config.get_text_config(), "layers_block_type", None) or ()
    if feed_forward := sum(kind in ("moe", "mlp") for kind in kinds):
        # Older versions of transformers give these layers a place in the cache, which stays empty
        count = min(count, len(kinds) - feed_forward - len(growing_layers(cache)))
    return max((sum(state[0].numel() for state in layer.states) for layer in layers), default=0) * count


def _add_adapters(model: Any, setting: MemorySetting, names: set[str]) -> Any:
    from peft import LoraConfig, get_peft_model

    targets: Any = setting.lora_target_modules
    if targets == ["all-linear"]:
        targets = "all-linear"
    elif targets and (unknown := sorted({t for t in targets if t.rsplit(".", 1)[-1] not in names})):
        raise ValueError(
            f"`lora_target_modules` must name linear layers of the model other than its LM head, {sorted(names)}, or "
            f"'all-linear', got {unknown}."
        )
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of `transformers` to PEFT
        try:
            return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=setting.lora_r, target_modules=targets))
        except ValueError as error:
            raise ValueError(
                f"`lora_target_modules` must be given where PEFT has no default for an architecture, got {targets}; the "
                f"model has {sorted(names)}. ({error})"
            ) from error


def estimate(shape: ModelShape, setting: MemorySetting) -> dict[str, dict[str, float]]:
    """
    Calculate the bytes of each component in each phase, on one GPU.

    Args:
        shape ([`ModelShape`]):
            Shape of the model, with the adapters of the setting.
        setting ([`MemorySetting`]):
            The settings of training.

    Returns:
        `dict[str, dict[str, float]]`: By component, then by phase (`PHASES`). ZeRO-2 divides gradients and optimizer
        states by the number of GPUs, ZeRO-3 and FSDP2 also parameters (Rajbhandari et al. 2020, figure 1).
    """
    # How the strategy shards parameters, gradients and optimizer states
    types, strategy, gpus = precision(setting), setting.strategy, setting.gpus
    zero3, sharded = strategy.startswith("zero3"), strategy in ("zero3", "zero3_offload", "fsdp2")
    offloaded = strategy == "zero3_offload"
    share = 0 if offloaded else 1 / gpus
    parts = share if sharded else 1
    states = share if strategy in ("zero2", "zero3", "zero3_offload", "fsdp2") else 1

    # Parameters and gradients
    frozen = shape.base if setting.use_peft else 0
    quantised = shape.linear * setting.load_in_4bit
    # NF4 (Dettmers et al. 2023): 4 bits, and for each 64 parameters a constant in fp32, or in 8 bits twice quantised
    four_bits = 0.5 + (1 / 64 + 4 / (64 * 256) if setting.use_bnb_nested_quant else 4 / 64)
    base = (frozen - quantised) * types.frozen + quantised * four_bits
    model = base + shape.trainable * types.trained
    reference = 0.0 if setting.use_peft or not setting.beta else shape.base * types.frozen
    gradients = shape.trainable * types.gradient * states
    # ZeRO-3 keeps the gradients' buffer; others free gradients before a generation, unless it is within a step
    within = setting.rollouts < setting.per_device_train_batch_size * setting.gradient_accumulation_steps

    # Whole copies of parameters, and copies of gradients
    gathered, live, backward = _whole_copies(shape, setting, types)
    # DDP's buckets are a second copy of the gradients; DeepSpeed has one bucket, ZeRO-2 in the backward pass only
    bucket = BUCKET * types.compute
    buffers = {"ddp": shape.trainable * types.gradient, "zero3": bucket, "zero3_offload": bucket}.get(strategy, 0)
    training_buffers = bucket if strategy == "zero2" else buffers
    copies = min(shape.trainable * share, LIVE if zero3 else float("inf")) * 4 if strategy.startswith("zero") else 0
    copies *= not offloaded

    # Activations and logits of the loss
    kept, layer_extra = activation_bytes(shape, setting, types)
    batch, completion = setting.per_device_train_batch_size, setting.max_completion_length
    head = head_bytes(shape, batch, completion, types, trained=not setting.use_peft)
    # The gradient of a tied LM head waits for that of the embedding
    waiting = shape.head * types.trained * (shape.tied and not setting.use_peft)

    # The generation
    prefill, scores = decoding_bytes(shape, setting, types)
    cache = kv_cache_bytes(shape, setting.rollouts, setting.length, types.compute) + state_bytes(
        shape, setting.rollouts
    )
    if setting.use_vllm:
        prefill = scores = cache = 0
    if share_of_vllm := setting.vllm_bytes:
        vllm_rollouts(shape, setting)  # raises an error without room for the model and one rollout
    beside = 0 if setting.vllm_enable_sleep_mode else share_of_vllm

    # By component and phase
    rows: dict[str, tuple[float, float, float, float]] = {
        "parameters": (model * parts,) * 4,
        "reference model": (reference * parts,) * 4,
        "whole copies of parameters": (gathered, live, backward, 0),
        "gradients": (gradients * (zero3 or within), gradients, gradients, gradients),
        "optimizer states": (shape.trainable * types.states * states,) * 4,
        "buckets, fp32 gradients": (buffers, training_buffers, training_buffers, buffers + copies),
        "key-value cache": (cache, 0, 0, 0),
        "vLLM": (share_of_vllm, beside, beside, beside),
        "activations": (prefill, kept, kept + layer_extra, 0),
        "logits, LM head": (scores, head, waiting, 0),
    }
    return {name: dict(zip(PHASES, values, strict=True)) for name, values in rows.items() if any(values)}


def _whole_copies(shape: ModelShape, setting: MemorySetting, types: Precision) -> tuple[float, float, float]:
    """The bytes of whole copies of parameters in a generation, in the forward and in the backward pass of the loss."""
    strategy = setting.strategy
    zero3, sharded = strategy.startswith("zero3"), strategy in ("zero3", "zero3_offload", "fsdp2")
    every = shape.base + (shape.trainable if setting.use_peft else 0)
    layer = (every - shape.outside) / shape.layers
    # In a forward pass, ZeRO-3 up to its limit; FSDP2 a layer, the next one, and what is outside the layers
    live = {"fsdp2": shape.outside + 2 * layer}.get(strategy, min(every, LIVE) if zero3 else 0.0) * types.compute
    if strategy == "fsdp2":
        backward = live + 2 * layer * types.compute * (shape.trainable / every)
    elif strategy in ("single", "ddp") and types.stream > types.compute:
        live = backward = shape.linear * types.compute  # autocast keeps casted weights until the forward ends
    else:
        backward = live
    gathered = every * types.compute if zero3 and setting.ds3_gather_for_generation else live * sharded
    if setting.use_vllm and not (zero3 and setting.use_peft):  # TRL gives vLLM one parameter at a time
        gathered = max(shape.head, shape.largest) * types.trained * sharded
    return gathered, live, backward


def peak(rows: dict[str, dict[str, float]]) -> tuple[float, str]:
    """The bytes and the name of the phase that needs most memory."""
    totals = {phase: sum(row[phase] for row in rows.values()) for phase in PHASES}
    phase = max(totals, key=lambda name: totals[name])
    return totals[phase], phase


def levers(shape: ModelShape, setting: MemorySetting) -> Iterator[tuple[int, str, MemorySetting]]:
    """
    Settings that may need less memory: their price, the advice, and the setting. Prices: 0 little, 1 the time of the
    rollouts, 2 another result of training.
    """
    size, steps = setting.per_device_train_batch_size, setting.gradient_accumulation_steps
    half = (setting.steps_per_generation or steps) // 2
    length = setting.max_completion_length // 2
    stage = {"ddp": "zero2", "zero2": "zero3", "zero3": "zero3_offload"}.get(setting.strategy)
    utilization = round(setting.vllm_gpu_memory_utilization / 2, 3)
    smaller = {
        "per_device_train_batch_size": size // 2,
        "gradient_accumulation_steps": 2 * steps,
        "steps_per_generation": 2 * (setting.steps_per_generation or steps),
    }
    flash = "use attn_implementation flash_attention_2"
    if setting.attn_implementation == "sdpa" and keeps_cache(shape, setting) and not setting.use_vllm:
        flash += " (each rollout then stores and reads the common beginning of all prompts)"
    changes: list[tuple[int, str, dict[str, Any]]] = [
        (0, "turn on gradient_checkpointing", {"gradient_checkpointing": True}),
        (0, f"reduce per_device_train_batch_size to {size // 2}, gradient_accumulation_steps {2 * steps}", smaller),
        (0, "use attn_implementation sdpa", {"attn_implementation": "sdpa"}),
        (0, flash, {"attn_implementation": "flash_attention_2"}),
        (0, f"change strategy to {stage}", {"strategy": stage}),
        (2, "use optim adamw_8bit", {"optim": "adamw_8bit"}),
        (2, "set beta to 0", {"beta": 0.0}),
        (2, "train adapters (use_peft)", {"use_peft": True}),
        (2, f"reduce max_completion_length to {length}", {"max_completion_length": length}),
    ]
    if not setting.use_vllm:
        text = f"reduce steps_per_generation to {half} (twice as many generation phases, each about as long)"
        changes.append((1, text, {"steps_per_generation": half}))
        four_bits = {"use_peft": True, "load_in_4bit": True}
        changes.append((2, "train adapters of a 4-bit model (load_in_4bit)", four_bits))
    if setting.vllm_bytes:
        changes.append((0, "turn on vllm_enable_sleep_mode", {"vllm_enable_sleep_mode": True}))
        text = f"reduce vllm_gpu_memory_utilization to {utilization}"
        changes.append((1, text, {"vllm_gpu_memory_utilization": utilization}))
    for price, text, change in changes:
        try:
            yield price, text, replace(setting, **change)
        except ValueError:  # a change that this setting does not allow
            continue


def advice(config: PreTrainedConfig, setting: MemorySetting) -> str | None:
    """The change that saves most memory, in one line; `None` if the setting fits its card."""
    shape = measure_shape(config, setting)
    before, phase = peak(estimate(shape, setting))
    room = setting.gpu_memory * GIB * HEADROOM
    if before <= room:
        return None
    found = []
    for price, text, changed in levers(shape, setting):
        try:
            same = changed.use_peft == setting.use_peft
            after, _ = peak(estimate(shape if same else measure_shape(config, changed), changed))
        except ValueError:  # PEFT has no default for this architecture, or vLLM no room
            continue
        # Prefer changes that fit, the cheapest first, then those that save most
        found.append((after > room, price if after <= room else 0, after, text))
    *_, after, text = min(found)
    return f"Biggest lever (the peak is in {phase}): {text}: {before / GIB:.1f} → {after / GIB:.1f} GiB."


def render(rows: dict[str, dict[str, float]]) -> str:
    """The estimate as a Markdown table in GiB, with the cards that it fits."""
    total, phase = peak(rows)
    lines = [[name, *(f"{row[p] / GIB:.2f}" if row[p] else "–" for p in PHASES)] for name, row in rows.items()]
    lines.append(["**sum**", *(f"{sum(row[p] for row in rows.values()) / GIB:.2f}" for p in PHASES)])
    table = markdown_table(["GiB per GPU", *PHASES], lines)
    fits = [
        f"{card} GB: {'yes' if total <= card * GIB * HEADROOM else 'tight' if total <= card * GIB else 'no'}"
        for card in CARDS
    ]
    return "\n".join([table, "", f"Peak: {total / GIB:.1f} GiB ({phase}). Fits {', '.join(fits)}."])


def argument_texts(kind: type) -> dict[str, str]:
    """The texts of the arguments in the docstring of a dataclass, for `--help`. Several arguments may share an entry."""
    found = re.findall(r"^ {8}(\w[\w, ]*) \(.*\):\n((?: {12}.*\n)+)", kind.__doc__ or "", re.MULTILINE)
    texts = [(names.split(", "), " ".join(text.split())) for names, text in found]
    return {name: text.replace("`", "").replace("%", "%%") for names, text in texts for name in names}


def main(arguments: Sequence[str] | None = None, known: Collection[str] | None = None) -> None:
    """
    Print the estimate of a command line; `--config` reads the YAML file of a run first.

    Args:
        arguments (`Sequence[str]`, *optional*):
            The arguments. Defaults to those of the process.
        known (`Collection[str]`, *optional*):
            Options of a run that do not decide its memory. If it is given, other keys of the file are refused.
    """
    parser = HfArgumentParser(
        MemorySetting,  # type: ignore[arg-type]
        prog="tspo memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    texts = argument_texts(MemorySetting)
    for action in parser._actions:
        if action.option_strings[0].startswith("--no_"):
            action.help = f"The opposite of --{action.dest}."
        elif action.dest in texts:
            action.help = texts[action.dest] + ("" if action.default is None else " (default: %(default)s)")
    parser.add_argument("--config", help="A YAML file of a run; options replace its values.")
    parser.add_argument(
        "--model",
        "--model_name_or_path",
        "--model-name-or-path",
        help="A folder or a name on the Hub: only its configuration is loaded.",
    )
    parser.add_argument("--model_type", default="llama", help="Instead of a model: an architecture, with its numbers.")
    # One line, without the usage of all options
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {message}\n")  # type: ignore[method-assign]
    options, others = parser.parse_known_args(arguments)
    try:
        if options.config is not None:
            values = read_run(options.config, known)
            names = {f.name for f in fields(MemorySetting)}
            parser.set_defaults(model=values.get("model_name_or_path"), **{k: values[k] for k in values.keys() & names})
            options, others = parser.parse_known_args(arguments)
        keys = [name.removeprefix("--") for name in others[::2]]
        if len(others) % 2 or not all(name.startswith("--") for name in others[::2]):
            raise ValueError(f"Options must be pairs of `--name value`, got {others}.")
        shape_names = AutoConfig.for_model(options.model_type).to_dict() if options.model_type in MODEL_TYPES else {}
        for key in keys if shape_names else ():
            if key.replace("-", "_") not in shape_names:
                options_and_shape = [*(action.dest for action in parser._actions), *shape_names]
                raise ValueError(f"Unknown option --{key}.{nearest(key, options_and_shape, '--')}")
        numbers = {k.replace("-", "_"): _read_value(k, value) for k, value in zip(keys, others[1::2], strict=True)}
        config = load_config(options.model, options.model_type, **numbers)
        setting = MemorySetting(**{f.name: getattr(options, f.name) for f in fields(MemorySetting)})
        shape = measure_shape(config, setting)
        rows = estimate(shape, setting)
    except (ValueError, OSError, yaml.YAMLError) as error:
        parser.exit(2, f"{parser.prog}: error: {' '.join(str(error).split())}\n")
    at_once = f"{setting.rollouts} rollouts at once"
    if setting.vllm_bytes:
        at_once += f"; vLLM has room for at most {vllm_rollouts(shape, setting)} of the maximum length"
    print(f"{shape.base:,} parameters, {shape.trainable:,} trained; {at_once}.\n")
    print(render(rows))
    if line := advice(config, setting):
        print(line)


if __name__ == "__main__":
    main()

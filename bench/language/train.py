"""One arm with one seed: trained, measured, and resumed where it was cut off."""

import math
import platform
import re
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

import sparsekern as sk
from bench.language.data import Text, batch
from bench.language.model import GPT, Shape, density, flops, live_weights, narrow

NARROW_DENSITY = 0.1  # whose FLOPs dense-narrow has
HELD_OUT_SEED = 1 << 40
PATTERN = re.compile(
    r"(?P<rule>set|rigl|gmp|static)-d(?P<density>0\.\d+)-b(?P<block_size>\d+)-(?P<distribution>erk|uniform)"
    r"(?P<balanced>-balanced)?(-drop(?P<drop>0\.\d+))?(-rewires(?P<rewires>[1-9]\d*))?"
)
OPTIONS = {"set": {"balanced", "drop", "rewires"}, "rigl": {"balanced", "drop", "rewires"}, "static": {"balanced"}}


@dataclass(frozen=True)
class Arm:
    rule: str
    density: float = 1.0
    block_size: int = 1
    distribution: str = "erk"
    balanced: bool = False
    """Rows with equal numbers of blocks."""
    drop: float = 0.3
    """Of the live blocks, at the first rewire."""
    rewires: int = 30
    """As many as a run would have, did they not end at three quarters of it."""


@dataclass(frozen=True)
class Settings:
    steps: int = 600
    sequences: int = 2
    learning_rate: float = 1e-3
    evaluate_every: int = 100
    held_out_sequences: int = 64
    device: str = "cpu"


def parse(name: str) -> Arm:
    if name in ("dense", "dense-narrow"):
        return Arm(name)
    found = match.groupdict() if (match := PATTERN.fullmatch(name)) else {}
    given = {option for option in ("balanced", "drop", "rewires") if found.get(option)}
    if not found or not given <= OPTIONS.get(found["rule"], set()):
        raise ValueError(
            "bench.language: an arm is 'dense', 'dense-narrow' or like 'set-d0.1-b16-erk' (set, rigl, gmp or static; "
            "density; block size; erk or uniform); all but gmp may end in '-balanced', and set and rigl also in "
            f"'-drop0.5' and '-rewires100', got {name!r}"
        )
    options = {"balanced": "balanced" in given}
    options |= {option: kind(found[option]) for option, kind in (("drop", float), ("rewires", int)) if option in given}
    return Arm(found["rule"], float(found["density"]), int(found["block_size"]), found["distribution"], **options)


def build(arm: Arm, shape: Shape, seed: int) -> GPT:
    torch.manual_seed(seed)
    model = GPT(narrow(shape, NARROW_DENSITY) if arm.rule == "dense-narrow" else shape)
    if arm.rule.startswith("dense"):
        return model
    initial = 1.0 if arm.rule == "gmp" else arm.density
    model = sk.sparsify(model, initial, arm.block_size, arm.distribution, exclude=["head"], keep="fresh")
    for layer in model.modules() if arm.balanced else ():
        if isinstance(layer, sk.SparseLinear):
            old = layer.topology
            new = sk.Topology.random(old.shape, old.num_live, old.block_size, balance="rows")
            old.replace(new.block_rows, new.block_cols)
            layer.reset_parameters()
    return model


def rule_for(arm: Arm, model: GPT, optimizer: torch.optim.Optimizer, steps: int, seed: int):
    """Rewires end at three quarters of the run; GMP takes "layer" scope where the distribution is uniform."""
    every, end = max(1, steps // arm.rewires), max(1, 3 * steps // 4)
    if arm.rule == "gmp":
        scope = "global" if arm.distribution == "erk" else "layer"
        return sk.GMP(model, optimizer, arm.density, end_step=end, update_every=every, scope=scope)
    if arm.rule in ("set", "rigl"):
        kind = sk.SET if arm.rule == "set" else sk.RigL
        balance = "rows" if arm.balanced else None
        return kind(model, optimizer, sk.cosine(arm.drop), every, end_step=end, seed=seed, balance=balance)
    return None


def held_out_bits(model: nn.Module, text: Text, settings: Settings, context: int) -> float:
    """Bits per byte on a fixed sample."""
    sample = batch(text.held_out, settings.held_out_sequences, context, HELD_OUT_SEED).to(settings.device)
    with torch.no_grad():
        losses = [loss_of(model, part, settings).item() * len(part) for part in sample.split(settings.sequences)]
    return sum(losses) / len(sample) / math.log(2)


def loss_of(model: nn.Module, tokens: torch.Tensor, settings: Settings) -> torch.Tensor:
    with torch.autocast("cuda", torch.bfloat16, enabled=settings.device == "cuda"):
        logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


def adamw(model: nn.Module, settings: Settings) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), settings.learning_rate, (0.9, 0.95), weight_decay=0.1, fused=True)


def learn(model: nn.Module, optimizer: torch.optim.Optimizer, tokens: torch.Tensor, settings: Settings) -> torch.Tensor:
    loss = loss_of(model, tokens, settings)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss


def now(settings: Settings) -> float:
    """Seconds: of the wall on a GPU; on a CPU of this process, by thread, since others use the machine as well."""
    if settings.device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time() / torch.get_num_threads()


class Yardstick:
    """Times a step of the dense model in the same process, so that a busy hour of the machine weighs on both."""

    def __init__(self, shape: Shape, text: Text, settings: Settings):
        with torch.random.fork_rng():
            self.model = build(Arm("dense"), shape, 0).to(settings.device)
        self.optimizer, self.settings = adamw(self.model, settings), settings
        self.tokens = batch(text.train, settings.sequences, shape.context, 0).to(settings.device)

    def seconds(self) -> float:
        """Of the faster of two steps."""
        times = []
        for _ in range(2):
            began = now(self.settings)
            learn(self.model, self.optimizer, self.tokens, self.settings)
            times.append(now(self.settings) - began)
            self.optimizer.zero_grad()
        return min(times)


def rate(step: int, settings: Settings) -> float:
    """A twentieth of the run warms up; a cosine falls to a tenth."""
    warm = max(1, settings.steps // 20)
    if step < warm:
        return settings.learning_rate * (step + 1) / warm
    progress = (step - warm) / max(1, settings.steps - warm)
    return settings.learning_rate * (0.55 + 0.45 * math.cos(math.pi * progress))


def held_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Of weights, gradients, optimiser state, coordinates and index, as they are now."""
    tensors = [*model.parameters(), *(p.grad for p in model.parameters() if p.grad is not None)]
    tensors += [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    topologies = sum(module.nbytes for module in model.modules() if isinstance(module, sk.Topology))
    return topologies + sum(t.numel() * t.element_size() for t in tensors)


def train(
    name: str,
    seed: int,
    text: Text,
    shape: Shape,
    settings: Settings,
    runs: Path,
    results: Path,
    stop: int | None = None,
) -> Path:
    """Continue from the checkpoint, if there is one, to the end or to step `stop`; the curve's CSV is returned."""
    arm = parse(name)
    model = build(arm, shape, seed).to(settings.device)
    optimizer = adamw(model, settings)
    rule = rule_for(arm, model, optimizer, settings.steps, seed)
    yardstick = Yardstick(shape, text, settings)
    checkpoint, csv = runs / f"{name}-seed{seed}.pt", results / f"{name}-seed{seed}.csv"
    step, seconds, dense_steps, total, rows = 0, 0.0, 0.0, 0.0, []
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=False)
        if saved["settings"] != (settings, shape, text.digest):
            raise ValueError(
                f"bench.language: {checkpoint} was begun with {saved['settings']}, "
                f"this command says {(settings, shape, text.digest)}; give another --runs folder"
            )
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        if rule is not None:
            rule.load_state_dict(saved["rule"])
        step, rows = saved["step"], saved["rows"]
        seconds, dense_steps, total = saved["seconds"], saved["dense_steps"], saved["flops"]
    since = 0.0  # seconds since the yardstick was last laid to them
    end = settings.steps if stop is None else stop
    bar = tqdm(total=settings.steps, initial=step, desc=f"{name} seed {seed}")
    while step < end:
        began = now(settings)
        for group in optimizer.param_groups:
            group["lr"] = rate(step, settings)
        tokens = batch(text.train, settings.sequences, shape.context, (seed << 20) + step).to(settings.device)
        loss = learn(model, optimizer, tokens, settings)
        if rule is not None:
            rule.step()
        since += now(settings) - began
        total += flops(model.shape, live_weights(model)) * settings.sequences * shape.context
        step += 1
        if step % settings.evaluate_every == 0 or step == end:
            seconds, dense_steps, since = seconds + since, dense_steps + since / yardstick.seconds(), 0.0
        if step % settings.evaluate_every == 0 or step == settings.steps:
            rows.append(
                {
                    "step": step,
                    "seconds": seconds,
                    "dense_steps": dense_steps,
                    "flops": total,
                    "train_loss": loss.item(),
                    "bits_per_byte": held_out_bits(model, text, settings, shape.context),
                    "density": density(model),
                    "bytes": held_bytes(model, optimizer),
                    "learning_rate": settings.learning_rate,
                    "data_digest": text.digest,
                    "python": platform.python_version(),
                }
            )
            replace(csv, partial(pandas.DataFrame(rows).to_csv, index=False))
        optimizer.zero_grad()
        if step % settings.evaluate_every == 0 or step == end:
            saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "rows": rows}
            saved |= {
                "seconds": seconds,
                "dense_steps": dense_steps,
                "flops": total,
                "settings": (settings, shape, text.digest),
            }
            saved |= {"rule": None if rule is None else rule.state_dict()}
            replace(checkpoint, partial(torch.save, saved))
        bar.update()
    bar.close()
    return csv


def replace(path: Path, write) -> None:
    """Write atomically: a run that is cut off leaves the older file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".partial")
    write(unfinished)
    unfinished.replace(path)

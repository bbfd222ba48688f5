"""The settings of a run: one frozen dataclass, which is the command line, and config.json in the run folder.

Defaults are the paper's (arXiv 2508.06871), except for `timesteps`: the paper trains for 400,000 on MiniGrid and for
2,000,000 on MT10. A timestep is one lock-step round in which every task's environment steps once: on MT10, ten
environment steps.
"""

import dataclasses
import json
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Literal

CONFIG = "config.json"  # files in a run folder: the settings,
ENVIRONMENT = "environment.txt"  # and a description of the machine

# Written out, and not read off the tables of suites and treatments, so that --help answers without importing torch.
Suite = Literal[
    "mt3",
    "mt5",
    "mt7",
    "mt10",
    "LavaGapS7",
    "RedBlueDoors-6x6",
    "MemoryS11",
    "DoorKey-6x6",
    "DistShift1",
    "SimpleCrossingS9N2",
    "MultiRoom-N2-S4",
]
Agent = Literal["mtppo", "moe", "moore", "mtsac"]
Treatment = Literal[
    "dense",
    "gmp",
    "set",
    "redo",
    "reset",
    "weight-decay",
    "layer-norm",
    "pcgrad",
    "gmp+weight-decay",
    "gmp+pcgrad",
    "lottery",
]
Networks = Literal["both", "actor", "critic"]
BlockSize = Literal[1, 2, 4, 8, 16, 32, 64, 128]


@dataclass(frozen=True)
class PPOConfig:
    """Of PPO on MiniGrid, as the paper has it; on mt10 --ppo-mt10 holds instead."""

    rollout_steps: int = 2000
    """Timesteps between two fits; every rollout starts fresh episodes."""
    epochs: int = 8
    """Passes of the actor over a rollout. The critic takes one step on all of it."""
    minibatch: int = 256
    """Transitions per task in a minibatch of the actor, on average: minibatches are drawn from the shuffled union."""
    learning_rate: float = 1e-3
    """Adam's, for actor and critic."""
    gamma: float = 0.99
    """Discount per timestep."""
    gae_lambda: float = 0.95
    """Decay per timestep of generalised advantage estimation."""
    clip: float = 0.2
    """The probability ratio earns nothing beyond 1 +- clip."""
    entropy: float = 0.01
    """Weight of the policy's entropy [nats] in the actor's loss."""


@dataclass(frozen=True)
class MT10PPOConfig:
    """Of PPO on mt10, where a linear baseline, fitted to each rollout, is the critic. The values are those of
    metaworld-algorithms; rl/algorithms/train_ppo_mt10.py says in what the algorithm differs from theirs."""

    rollout_steps: int = 10_000
    """Timesteps between two fits, 20 episodes of every task; every rollout starts fresh ones."""
    epochs: int = 16
    """Passes of the actor over a rollout."""
    minibatches: int = 32
    """Steps of the actor in a pass, each on as many transitions, drawn from the shuffled union of all tasks."""
    learning_rate: float = 3e-4
    """Adam's."""
    gamma: float = 0.99
    """Discount per timestep."""
    gae_lambda: float = 0.97
    """Decay per timestep of generalised advantage estimation."""
    clip: float = 0.2
    """The probability ratio earns nothing beyond 1 +- clip."""
    entropy: float = 5e-3
    """Weight of the policy's entropy [nats] in the actor's loss."""
    max_gradient_norm: float = 1.0
    """Gradients of all parameters together are scaled down to it."""


@dataclass(frozen=True)
class SACConfig:
    batch: int = 128
    """Transitions per task in an update; there is one update per timestep."""
    warmup: int = 4000
    """Timesteps of random actions before the first update."""
    capacity: int = 100_000
    """Transitions per task that the replay buffer holds; 416 bytes each."""
    learning_rate: float = 3e-4
    """Adam's, for actor, critics and temperatures."""
    gamma: float = 0.99
    """Discount per timestep."""
    tau: float = 0.005
    """Share of the critics that the target critics take over at every update."""
    clip: float | None = 5000.0
    """Values and their targets are clipped to +- clip, as in the code of the paper's time; None: they are not."""
    time_out_ends: bool = True
    """Store a time-out as the end of all rewards, as in the code of the paper's time; else it bootstraps."""
    max_gradient_norm: float = 1.0
    """Of actor and of both critics together; the temperatures' is not bounded."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where networks and replay buffer live; auto: a GPU if there is one."""
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    """Of float32 products, as torch.set_float32_matmul_precision has it. A GPU takes TensorFloat32 for high and medium,
    and a CPU may take bfloat16 for medium."""


@dataclass(frozen=True)
class SETConfig:
    drop_fraction: float = 0.3
    """Share of a layer's live blocks that moves at a rewire."""
    update_every: int = 2000
    """Timesteps between two rewires."""
    initial: Literal["dense", "fan-in"] = "dense"
    """First weights: dense, those of the dense network that survive the mask, as in the paper; fan-in, drawn for the
    inputs that each neuron really has, which are larger."""


@dataclass(frozen=True)
class GMPConfig:
    start: float = 0.05
    """Share of the run after which pruning starts."""
    end: float = 0.8
    """Share of the run after which the final density is reached."""
    update_every: int | None = None
    """Timesteps between two prunings; those that fall into one rollout are done at once, after its fit. If not given,
    the paper's 500, on mt10 5000."""


@dataclass(frozen=True)
class ReDoConfig:
    every: int = 5000
    """Timesteps between two recyclings."""
    tau: float = 0.001
    """A neuron is dormant if it is at most this active, relative to the mean of its layer."""


@dataclass(frozen=True)
class ResetConfig:
    every: int = 100_000
    """Timesteps between two resets."""
    times: int = 2
    """Resets in a run, at most."""


PARTS = {
    "set": SETConfig,
    "gmp": GMPConfig,
    "redo": ReDoConfig,
    "reset": ResetConfig,
    "ppo": PPOConfig,
    "ppo_mt10": MT10PPOConfig,
    "sac": SACConfig,
}


COUNTS = (
    "timesteps", "evaluate_every", "episodes", "threads", "workers",
    "ppo.rollout_steps", "ppo.epochs", "ppo.minibatch",
    "ppo_mt10.rollout_steps", "ppo_mt10.epochs", "ppo_mt10.minibatches",
    "sac.batch", "sac.warmup", "sac.capacity",
    "set.update_every", "gmp.update_every", "redo.every", "reset.every",
)  # fmt: skip
"""Settings of which there is at least one."""
SHARES = (
    "ppo.gamma", "ppo.gae_lambda", "ppo_mt10.gamma", "ppo_mt10.gae_lambda", "sac.gamma", "sac.tau",
    "set.drop_fraction", "gmp.start", "gmp.end",
)  # fmt: skip
"""Settings from 0 to 1."""


@dataclass(frozen=True)
class Config:
    """Train one agent on one suite of tasks, and print what it earned and what it cost.

    Example: python rl/run.py --suite mt3 --agent mtppo --treatment set --density 0.05 --block-size 1 --seed 0
    """

    suite: Suite = "mt3"
    """Tasks: 3, 5 or 7 of MiniGrid, or one of them, for the single-task reference (with agent mtppo); mt10 is
    Meta-World's."""
    agent: Agent = "mtppo"
    """mtppo: PPO, one encoder for all tasks, one head per task. moe: several encoders, mixed by weights that each task
    learns. moore: the same, after making the encoders' outputs orthonormal. On mt10 a linear baseline stands in for
    their critic. mtsac: soft actor-critic, one encoder, one head per task; for mt10."""
    treatment: Treatment = "set"
    """dense: nothing. gmp: prune gradually by magnitude. set: sparse throughout, small weights move at random. redo:
    dormant neurons start anew. reset: the last layers start anew. lottery: train what gmp kept from its first values.
    pcgrad: project tasks' conflicting gradients. weight-decay, layer-norm, gmp with one of them: as they say."""
    networks: Networks = "both"
    """Which networks are treated; the others are dense. On mt10 the actor is the only network of all but mtsac."""
    density: float = 0.05
    """Live blocks / all blocks, in (0, 1]: gmp ends with it, over all weights; set keeps it, over linear layers."""
    block_size: BlockSize = 1
    """Side of the blocks that live and die together; 1 is unstructured, as in the paper."""
    seed: int = 0
    """The same command with the same seed writes the same metrics.csv, but for its time/ rows."""
    timesteps: int = 100_000
    """Length of the run; the paper's is 400,000, on mt10 2,000,000."""
    evaluate_every: int | None = None
    """Timesteps between evaluations (at the next end of a rollout), each followed by a checkpoint; if not given, the
    paper's 10,000, on mt10 20,000."""
    episodes: int | None = None
    """Episodes per task in an evaluation; if not given, the paper's 25, on mt10 50."""
    threads: int = 1
    """Threads of PyTorch. More than one gains little on networks of this size; cores are better used by other runs."""
    workers: int = 1
    """Processes that step the environments of mt10, at most 10; MiniGrid's are stepped by the learner itself."""
    evaluators: int | None = None
    """Processes that play evaluations of mt10, with a copy of the policy, while the learner goes on; 0: it waits. More
    than there are episodes have nothing to do. If not given, as many as workers. MiniGrid's take the learner 2% of its
    time, and have no processes."""
    runs: Path = Path("runs")
    """Run folders are made here: <runs>/<suite>-<agent>-<treatment>.../<seed>-<time>/."""
    wandb: bool = False
    """Send what TensorBoard gets to Weights & Biases too (needs the extra `wandb`, and an account or
    WANDB_MODE=offline)."""
    ticket: Path | None = None
    """Of treatment lottery: the folder of the finished gmp run, same seed, whose surviving weights are trained."""
    weight_decay: float = 1e-6
    """Of treatments with weight decay: Adam's L2 factor."""
    ppo: PPOConfig = PPOConfig()
    ppo_mt10: MT10PPOConfig = MT10PPOConfig()
    sac: SACConfig = SACConfig()
    set: SETConfig = SETConfig()
    gmp: GMPConfig = GMPConfig()
    redo: ReDoConfig = ReDoConfig()
    reset: ResetConfig = ResetConfig()

    def __post_init__(self):
        mt10 = self.suite == "mt10"
        for name, value in self._papers_evaluation.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)  # frozen from here on
        if self.evaluators is None:
            object.__setattr__(self, "evaluators", self.workers if mt10 else 0)
        if self.gmp.update_every is None:
            gmp = replace(self.gmp, update_every=self.papers_gmp_update_every)
            object.__setattr__(self, "gmp", gmp)
        if not 0 < self.density <= 1:
            raise ValueError(f"density must be in (0, 1], got {self.density}")
        for name in COUNTS:
            if (value := attrgetter(name)(self)) < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in SHARES:
            if not 0 <= (value := attrgetter(name)(self)) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {value}")
        if self.gmp.start > self.gmp.end:
            raise ValueError(f"gmp.start must be at most gmp.end, got {self.gmp.start} and {self.gmp.end}")
        if mt10 and self.workers > 10:
            raise ValueError(f"workers must be in 1..10 on mt10, which has ten environments, got {self.workers}")
        if self.evaluators < 0:
            raise ValueError(f"evaluators must be at least 0, got {self.evaluators}")
        if self.evaluators and not mt10:
            raise ValueError(f"evaluators belong to suite mt10, got {self.evaluators} with suite {self.suite}")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")
        if self.agent == "mtsac" and self.suite != "mt10":
            raise ValueError(f"agent mtsac belongs to suite mt10, got {self.suite}")
        if self.actor_alone and self.networks == "critic":
            raise ValueError(f"agent {self.agent} has no critic network on mt10, got networks {self.networks}")
        if (self.treatment == "lottery") != (self.ticket is not None):
            raise ValueError(f"ticket belongs to treatment lottery, got {self.treatment} with ticket {self.ticket}")

    @property
    def sparse(self) -> bool:
        """Whether density and block size mean anything."""
        return self.treatment.split("+")[0] in ("gmp", "set", "lottery")

    @property
    def prunes(self) -> bool:
        """Whether the settings of gmp mean anything: of a lottery they are its ticket's."""
        return self.treatment.split("+")[0] in ("gmp", "lottery")

    @property
    def algorithm(self) -> Literal["ppo", "ppo_mt10", "sac"]:
        """The part that holds its settings."""
        if self.agent == "mtsac":
            return "sac"
        return "ppo_mt10" if self.suite == "mt10" else "ppo"

    @property
    def actor_alone(self) -> bool:
        """Whether the actor is the only network."""
        return self.algorithm == "ppo_mt10"

    @property
    def _papers_evaluation(self) -> dict[str, int]:
        return (
            {"evaluate_every": 20_000, "episodes": 50}
            if self.suite == "mt10"
            else {"evaluate_every": 10_000, "episodes": 25}
        )

    @property
    def papers_timesteps(self) -> int:
        return 2_000_000 if self.suite == "mt10" else 400_000

    @property
    def papers_gmp_update_every(self) -> int:
        """What gmp.update_every is where it is not given."""
        return 5000 if self.suite == "mt10" else 500

    @property
    def experiment(self) -> str:
        """What runs that differ only in seed share."""
        parts = [self.suite, self.agent, self.treatment]
        if self.sparse:
            parts += [f"density{self.density:g}", f"block{self.block_size}"]
        if self.treatment == "set" and self.set.initial != SETConfig.initial:
            parts.append(self.set.initial)
        if self.prunes and self.gmp.update_every != self.papers_gmp_update_every:
            parts.append(f"every{self.gmp.update_every}")
        if self.treatment != "dense" and self.networks != "both":
            parts.append(self.networks)
        unnamed = {name: value for name, value in deviations(self).items() if name not in NAMED}
        parts += [f"{name.rpartition('.')[2].replace('_', '-')}{value}" for name, value in unnamed.items()]
        return "-".join(parts)

    def save(self, folder: Path) -> None:
        """Write the settings into this folder, which makes it a run folder."""
        writing = folder / f"{CONFIG}.writing"
        writing.write_text(json.dumps(dataclasses.asdict(self), indent=2, default=str) + "\n")
        writing.replace(folder / CONFIG)  # whole at once: a sweep reads the folders of its runs at any time

    @classmethod
    def load(cls, folder: Path) -> "Config":
        """Read the settings of the run in this folder.

        Raises:
            ValueError: it is no run folder, or its settings are not those of a run of this version.
        """
        if not (folder / CONFIG).exists():
            raise ValueError(f"{folder} is no run folder, it has no {CONFIG}")
        try:
            values = json.loads((folder / CONFIG).read_text())
            values["set"] = {"initial": "fan-in"} | values.get("set", {})  # what runs did before they had the choice
            values |= {name: part(**values.get(name, {})) for name, part in PARTS.items()}
            values |= {name: Path(values[name]) for name in ("runs", "ticket") if values.get(name)}
            return cls(**values)
        except (ValueError, TypeError, AttributeError) as error:  # cut off, of another version, or no settings at all
            raise ValueError(f"{folder / CONFIG} does not hold a run's settings: {error}") from error


NAMED = ("density", "block_size", "networks", "set.initial", "gmp.update_every")
"""Settings that `Config.experiment` has words of its own for."""


def identity(config: Config) -> Config:
    """The settings that decide what a run does; where, with what machinery, and options of other treatments do not."""
    machinery = {"threads": 1, "workers": 1, "evaluators": 0, "wandb": False}
    same = replace(config, runs=Path(), **machinery, ticket=config.ticket and Path())
    same = replace(same, sac=replace(same.sac, device="auto"))
    parts = [*config.treatment.split("+"), *["gmp"] * config.prunes]
    unused = [name for name in ("set", "gmp", "redo", "reset") if name not in parts]
    unused += [name for name in ("ppo", "ppo_mt10", "sac") if name != config.algorithm]
    unused += ["weight_decay"] * ("weight-decay" not in parts)
    unused += ["density", "block_size"] * (not config.sparse)
    unused += ["networks"] * (config.treatment == "dense" or config.actor_alone)
    return replace(same, **{name: getattr(Config, name) for name in unused})


def settings(config: Config) -> dict[str, object]:
    """By name, as on the command line: those of the parts first."""
    values = dataclasses.asdict(config)
    parts = {f"{name}.{option}": value for name in PARTS for option, value in values.pop(name).items()}
    return parts | values


def deviations(config: Config) -> dict[str, object]:
    """The settings of `identity`, but seed and length, that are not the defaults of this suite, agent and treatment."""
    standard = Config(suite=config.suite, agent=config.agent, treatment=config.treatment, ticket=config.ticket)
    usual, own = settings(identity(standard)), settings(identity(config))
    return {name: value for name, value in own.items() if value != usual[name] and name not in ("seed", "timesteps")}

"""Film a trained agent: python rl/play.py RUN --task DoorKey-6x6 --video agent.gif.

The agent is that of the run's last checkpoint, and acts as it does in evaluations. A GIF needs nothing more than the
experiments do; other formats need the extra `video`.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import tyro

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # started as a script: the checkout is where `rl` is

MINIGRID_FPS = 6
MT10_STRIDE, MT10_FPS = 2, 40  # every second frame of what its environments call 80 a second
MT10_SIZE = 480  # pixels of a side
CAMERA = "corner4"  # of Meta-World's: it looks at the hand from beside the robot
GOALS = 50  # seed of Meta-World's goals, from which each episode's is drawn


@dataclass(frozen=True)
class Play:
    run: tyro.conf.Positional[Path]
    """The folder of the run."""
    video: Path
    """Written here: .gif, or .mp4 and what else FFmpeg knows."""
    task: str | None = None
    """One of the suite's, by its name in the tables; a suite of one task needs none."""
    episodes: int = 3
    """Filmed one after the other."""
    seed: int = 0
    """Decides which episodes are played, and what a policy that draws its actions draws."""


def main() -> None:
    chosen = tyro.cli(Play, description=__doc__, prog="python rl/play.py")
    if sys.platform == "linux" and "DISPLAY" not in os.environ:
        os.environ.setdefault("MUJOCO_GL", "egl")  # else it looks for a screen; read when MuJoCo is imported
    try:
        play(chosen)
    except (ValueError, RuntimeError) as error:  # about what was typed, or is missing: the sentence is enough
        sys.exit(f"rl/play.py: {error}")


def play(chosen: Play) -> None:
    """Film the episodes and write them; prints what each returned."""
    from rl.envs import SUITES
    from rl.run import trained
    from rl.seeds import Stream, numpy_generator

    if chosen.episodes < 1:
        raise ValueError(f"episodes must be at least 1, got {chosen.episodes}")
    require_writer(chosen.video)  # before anything is played
    with trained(chosen.run, episodes=1) as trainer:
        mt10 = trainer.config.suite == "mt10"
        names = [task.name for task in SUITES[trainer.config.suite]]
        name = names[0] if chosen.task is None and len(names) == 1 else chosen.task
        if name not in names:
            raise ValueError(f"task must be one of {', '.join(names)}, got {name}")
        task = names.index(name)
        env = SUITES[trainer.config.suite][task](*([GOALS] if mt10 else []))
        stride, fps = (MT10_STRIDE, MT10_FPS) if mt10 else (1, MINIGRID_FPS)
        generator = numpy_generator(chosen.seed, Stream.EVALUATION, trainer.clock)
        frames = []
        with filming(env, mt10) as picture:
            for episode in range(chosen.episodes):
                observation, _ = env.reset(seed=int(generator.integers(2**31)))
                frames.append(picture())
                earned, steps, ended = 0.0, 0, False
                while not ended:
                    action = trainer.act(observation, task, generator)
                    observation, reward, terminated, truncated, info = env.step(action)
                    earned, steps = earned + reward, steps + 1
                    solved = bool(info["success"]) if mt10 else earned > 0
                    ended = terminated or truncated or (mt10 and solved)  # as in an evaluation
                    if ended or steps % stride == 0:
                        frames.append(picture())
                frames += [frames[-1]] * fps  # a second to look at how it ended
                words = "solved" if solved else "not solved"
                print(f"episode {episode}: {words} in {steps} steps, return {earned:.3f}", flush=True)
    write(chosen.video, frames, fps)
    print(chosen.video)


@contextmanager
def filming(env: gym.Env, mt10: bool) -> Iterator[Callable[[], np.ndarray]]:
    """Gives a function that takes a picture of this environment: uint8 [height, width, 3].

    Raises:
        RuntimeError: this machine cannot draw MT10.
    """
    env = env.unwrapped
    if not mt10:
        env.render_mode = "rgb_array"  # from above; cells that the agent sees are lighter
        yield env.render
        return
    try:
        import mujoco

        renderer = mujoco.Renderer(env.model, MT10_SIZE, MT10_SIZE)
    except Exception as error:  # of what kind depends on the library that MuJoCo draws with
        raise RuntimeError(
            f"filming mt10 needs an OpenGL that draws without a screen, but MuJoCo has none ({error}); "
            "MUJOCO_GL=egl, osmesa or glfw chooses another"
        ) from error

    def picture() -> np.ndarray:
        renderer.update_scene(env.data, camera=CAMERA)
        return renderer.render()[::-1, ::-1]  # the camera is mounted upside down

    with closing(renderer):
        yield picture


def require_writer(video: Path) -> None:
    """Raise ValueError or RuntimeError if such a file cannot be written."""
    if not video.suffix:
        raise ValueError(f"video must be the name of a file that ends in .gif or .mp4, got {video}")
    if not video.absolute().parent.is_dir():
        raise ValueError(f"video must lie in a folder that exists, got {video}")
    if video.suffix.lower() == ".gif":
        return
    for module in ("imageio", "imageio_ffmpeg"):
        try:
            __import__(module)
        except ModuleNotFoundError as error:
            raise RuntimeError(
                f"a video {video.suffix} needs {error.name}: pip install 'sparsekern[video]', or write a .gif"
            ) from error


def write(video: Path, frames: list[np.ndarray], fps: int) -> None:
    """Write the frames, so many a second."""
    if video.suffix.lower() == ".gif":
        from PIL import Image

        first, *rest = map(Image.fromarray, frames)
        first.save(video, save_all=True, append_images=rest, duration=round(1000 / fps), loop=0)
    else:
        import imageio

        imageio.mimwrite(video, frames, fps=fps)


if __name__ == "__main__":
    main()

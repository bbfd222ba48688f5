"""rl/envs/workers: environments in worker processes do what they do here, and no process outlives its use."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from counter import Counter, count
from gymnasium.error import AlreadyPendingCallError, ClosedEnvironmentError, NoAsyncCallError
from gymnasium.vector import SyncVectorEnv

from rl.envs.workers import share_out

STILL = np.zeros((3, 1))


@pytest.fixture(scope="module")
def envs():
    """Of lengths 2, 3 and 9, in two processes."""
    envs = count()
    yield envs
    envs.close()


def test_environments_do_what_they_do_in_this_process(envs):
    here = SyncVectorEnv([lambda n=n: Counter(n) for n in (2, 3, 9)], autoreset_mode="SameStep")
    np.testing.assert_array_equal(envs.reset(seed=[5, 6, 5])[0], here.reset(seed=[5, 6, 5])[0])
    ends = 0
    for actions in np.random.default_rng(0).uniform(-0.9, 0.9, (12, 3, 1)).astype(np.float32):
        *found, infos = envs.step(actions)
        *expected, their_infos = here.step(actions)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.dtype == theirs.dtype
            np.testing.assert_array_equal(ours, theirs)
        for i in range(3):
            if ended := expected[2][i] or expected[3][i]:
                ends += 1
                last, moved = their_infos["final_obs"][i], their_infos["final_info"]["moved"][i]
            else:
                last, moved = expected[0][i], their_infos["moved"][i]
            assert infos["_final_obs"][i] == ended
            np.testing.assert_array_equal(infos["final_obs"][i], last)
            assert infos["moved"][i] == np.float32(moved)
    assert ends == 6 + 4 + 1


def test_seeds_repeat_what_follows_and_none_goes_on(envs):
    def starts():
        return [envs.step(STILL)[0][0, 0] for _ in range(6)]  # that of length 2 starts three times

    first, _ = envs.reset(seed=3)  # 3, 4, 5
    seen = starts()
    np.testing.assert_array_equal(envs.reset(seed=[3, 4, 5])[0], first)
    assert starts() == seen
    assert (envs.reset()[0] != first).any()
    with pytest.raises(ValueError, match="3 environments need one seed each, got 2"):
        envs.reset(seed=[1, 2])


def test_only_masked_environments_step(envs):
    before, _ = envs.reset(seed=0)
    observations, rewards, _, truncated, infos = envs.step(STILL, mask=np.array([False, True, False]))
    assert (observations - before)[:, 0].tolist() == [0, 1, 0]
    assert rewards.tolist() == [0, 1, 0]
    _, _, _, truncated, infos = envs.step(STILL, mask=np.array([True, False, True]))
    _, _, _, truncated, infos = envs.step(STILL, mask=np.array([True, False, True]))
    assert truncated.tolist() == infos["_final_obs"].tolist() == [True, False, False]
    _, _, _, truncated, infos = envs.step(STILL, mask=np.array([False, True, True]))
    assert not truncated.any() and not infos["_final_obs"].any()  # the flag of the one that ended is not left standing


def test_a_step_goes_on_while_the_caller_works(envs):
    envs.reset(seed=0)
    first = envs.step(STILL)
    kept = [array.copy() for array in first[:4]]
    actions = STILL.copy()
    envs.step_async(actions)
    actions[:] = 0.5  # the step under way has its own
    for call in (lambda: envs.step_async(STILL), lambda: envs.reset(), lambda: envs.get_attr("steps")):
        with pytest.raises(AlreadyPendingCallError, match="call step_wait first"):
            call()
    assert envs.step_wait()[0][2, 1] == 0
    for array, copy in zip(first[:4], kept, strict=True):
        np.testing.assert_array_equal(array, copy)
    with pytest.raises(NoAsyncCallError, match="no step was begun"):
        envs.step_wait()


def test_methods_and_attributes_are_those_of_each_environment(envs):
    assert envs.call("learn", "something") == ("none",) * 3
    assert envs.get_attr("word") == ("something",) * 3
    assert envs.get_attr("length") == (2, 3, 9)


def test_costly_environments_are_shared_out_evenly():
    assert share_out([5, 1, 1, 2, 1], 2) == [[0], [1, 2, 3, 4]]
    assert share_out([1, 1, 1, 1], 2) == [[0, 2], [1, 3]]
    for num_workers in (0, 4):
        with pytest.raises(ValueError, match=rf"num_workers must be in 1..3, got {num_workers}"):
            count(num_workers=num_workers)


@pytest.mark.parametrize("how", ["exits", "raises", "is killed", "is killed while stepping"])
def test_a_worker_s_death_is_told_and_ends_the_others(how):
    envs = count((2, 9), num_workers=2)
    envs.reset(seed=0)
    pids = worker_pids(envs)
    actions, code = {"exits": (1, 3), "raises": (-1, 1)}.get(how, (0, -9))
    if how == "is killed while stepping":
        os.kill(pids[1], signal.SIGSTOP)
        envs.step_async(np.zeros((2, 1)))
    if "killed" in how:
        os.kill(pids[1], signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=f"the process of count to 9 died with exit code {code}"):
        envs.step_wait() if "stepping" in how else envs.step(np.array([[0], [actions]]))
    assert time.monotonic() - start < 3
    assert not any(map(alive, pids))
    with pytest.raises(ClosedEnvironmentError, match="were closed"):
        envs.reset()


def test_a_worker_that_cannot_make_its_environment_is_told():
    envs = count(("no number",), num_workers=1)
    with pytest.raises(RuntimeError, match="the process of count to no number died with exit code 1; its error is"):
        envs.reset(seed=0)


def test_no_process_is_left_after_close():
    own = count((2, 9), num_workers=2)
    own.reset(seed=0)
    own.step_async(np.zeros((2, 1)))
    pids = worker_pids(own)
    assert all(map(alive, pids))
    own.close()
    assert not any(map(alive, pids))
    own.close()  # once more does no harm


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), signal.SIGKILL)", "raise ValueError", "pass"])
def test_no_process_is_left_when_the_caller_ends(end):
    code = f"""
import os, signal, numpy as np
from counter import count
envs = count((2, 9), num_workers=2)
envs.reset(seed=0)
envs.step_async(np.zeros((2, 1)))
print(*(worker.process.pid for worker in envs._workers), flush=True)
{end}
"""
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": f"{root / 'tests' / 'helpers'}{os.pathsep}{root}"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2, done.stderr
    deadline = time.monotonic() + 5
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, pids))


def worker_pids(envs) -> list[int]:
    return [worker.process.pid for worker in envs._workers]


def alive(pid: int) -> bool:
    """Whether there is such a process and it has not ended (as one that nobody waited for, a zombie, has)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False

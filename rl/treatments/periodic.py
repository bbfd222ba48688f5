"""What ReDo and Reset share: acting at regular times, which fall between two fits."""


class Periodic:
    """Calls act(clock) at the first step at or past every multiple of `every`, at most `times` times."""

    def __init__(self, every: int, times: int | None = None):
        self.every, self.times = every, times
        self.clock = 0

    def act(self, clock: int) -> None:
        raise NotImplementedError

    def step(self, clock: int) -> None:
        before, now = self.clock // self.every, clock // self.every
        self.clock = clock
        if now > before and (self.times is None or before < self.times):
            self.act(clock)

    def state_dict(self) -> dict:
        return {"clock": self.clock}

    def load_state_dict(self, state: dict) -> None:
        self.clock = state["clock"]

"""RewireCallback for Lightning's Trainer: one step of a rule after each step of the optimiser."""

try:
    from lightning.pytorch import Callback
except ImportError as error:
    raise ImportError("sparsekern.integrations.lightning needs it: pip install lightning") from error


class RewireCallback(Callback):
    """Build a rule when training starts, step it after each optimiser step, and carry its state in checkpoints.

    Accumulated micro-batches count as one step. A module with several optimisers gives `make_rule` their list, and a
    batch counts as one step however many of them it stepped.

    Args:
        make_rule: function of (module, optimizer) that returns the rule.
    Example:
        >>> callback = RewireCallback(lambda model, optimizer: sk.SET(model, optimizer, update_every=100))
        >>> Trainer(callbacks=[callback]).fit(module, loader)
    """

    def __init__(self, make_rule):
        self.make_rule = make_rule
        self.rule = self._saved = None

    def on_train_start(self, trainer, pl_module):
        # here, not in on_fit_start: by now a checkpoint's weights and optimiser state are in place
        optimizers = trainer.optimizers
        self.rule = self.make_rule(pl_module, optimizers[0] if len(optimizers) == 1 else optimizers)
        if self._saved is not None:
            self.rule.load_state_dict(self._saved)
            self._saved = None
        self._steps = trainer.global_step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step != self._steps:
            self._steps = trainer.global_step
            self.rule.step()

    def state_dict(self) -> dict:
        return {} if self.rule is None else self.rule.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self._saved = state

"""RewireCallback for Hugging Face's Trainer: one step of a rule after each step of the optimiser."""

import base64
import io

import torch

try:
    from transformers.trainer_callback import ExportableState, TrainerCallback
except ImportError as error:
    raise ImportError("sparsekern.integrations.transformers needs it: pip install transformers") from error


class RewireCallback(TrainerCallback, ExportableState):
    """Build a rule when training begins, step it after each optimiser step, and carry its state in checkpoints.

    Accumulated micro-batches count as one step. The state lies in `trainer_state.json`, so
    `train(resume_from_checkpoint=...)` continues the rule; a call of `train()` without it begins a new rule.

    Args:
        make_rule: function of (model, optimizer) that returns the rule.
    Example:
        >>> callback = RewireCallback(lambda model, optimizer: sk.SET(model, optimizer, update_every=100))
        >>> Trainer(model, arguments, train_dataset=data, callbacks=[callback])
    """

    def __init__(self, make_rule):
        if not callable(make_rule):
            hint = "leave restore_callback_states_from_checkpoint at False, the rule is restored without it"
            raise ValueError(f"RewireCallback: make_rule must be a function, got {make_rule}; {hint}")
        self.make_rule = make_rule
        self.rule = None

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.rule = self.make_rule(model, optimizer)
        # a state that was resumed may lack the entry, and a Trainer that saves takes it to be there
        entry = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        if isinstance(entry, list):
            raise ValueError(f"RewireCallback: a Trainer takes one, got {len(entry)}; make one rule of several models")
        saved = entry.get("attributes")
        if saved and state.global_step:  # at step 0, the state that is there is of an earlier `train()`
            file = io.BytesIO(base64.b64decode(saved["rule"]))
            self.rule.load_state_dict(torch.load(file, weights_only=True))

    def on_step_end(self, args, state, control, **kwargs):
        self.rule.step()

    def state(self) -> dict:
        if self.rule is None:
            return {"args": {"make_rule": None}, "attributes": {}}
        torch.save(self.rule.state_dict(), file := io.BytesIO())
        return {"args": {"make_rule": None}, "attributes": {"rule": base64.b64encode(file.getvalue()).decode()}}

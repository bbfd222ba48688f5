"""RewireCallback for Stable-Baselines3: one step of a rule after each step of the optimiser."""

try:
    from stable_baselines3.common.callbacks import BaseCallback
except ImportError as error:
    raise ImportError("sparsekern.integrations.stable_baselines3 needs it: pip install stable-baselines3") from error

from sparsekern.integrations.sparse_policy import sparse_policy as sparse_policy
from sparsekern.integrations.sparse_policy import trained
from sparsekern.layer import SparseLayer


class RewireCallback(BaseCallback):
    """Build a rule for each sparse network when `learn` starts, and step it after each step of that net's optimiser.

    `make_rule(network, optimizer, followers)` returns the rule; target networks are followers. Times are in steps of
    the optimiser, not of the environment. The rules' state is the algorithm's attribute `rewire_state`, which it saves;
    `learn` continues from it, also after `load`. Build policies with `sparse_policy`.
    """

    def __init__(self, make_rule):
        super().__init__()
        self.make_rule, self.rules = make_rule, {}

    def _on_training_start(self) -> None:
        self._remove_hooks()  # of a `learn` that was interrupted
        saved = getattr(self.model, "rewire_state", {})
        nets = list(trained(self.model.policy))
        sparse = [net for net in nets if any(isinstance(module, SparseLayer) for module in net[1].modules())]
        for name, network, optimizer, targets in sparse or nets:  # without any, the rule says so
            self.rules[name] = rule = self.make_rule(network, optimizer, targets)
            rule.load_state_dict(saved.get(name, rule.state_dict()))
            optimizer.rewire_hook = optimizer.register_step_post_hook(lambda *_, rule=rule: rule.step())

    def _on_rollout_start(self) -> None:
        self.model.rewire_state = {name: rule.state_dict() for name, rule in self.rules.items()}

    def _on_step(self) -> bool:
        return True

    def _on_training_end(self) -> None:
        self._on_rollout_start()
        self._remove_hooks()

    def _remove_hooks(self) -> None:
        for _, _, optimizer, _ in trained(self.model.policy):
            if hook := vars(optimizer).pop("rewire_hook", None):
                hook.remove()

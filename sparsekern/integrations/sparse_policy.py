"""Policies of Stable-Baselines3 with sparse networks: built sparse, so that the algorithm's save and load fit them."""

from sparsekern.convert import sparsify


def sparse_policy(policy_class: type, *args, **options) -> type:
    """A subclass of a policy class whose networks are made sparse, `sparsify(policy, *args, **options)`.

    Example:
        >>> model = PPO(sparse_policy(MlpPolicy, density=0.2, block_size=8), "CartPole-v1")
        >>> model.save("sparse")
        >>> model = PPO.load("sparse")
    """

    class SparsePolicy(policy_class):
        def __init__(self, *policy_args, **policy_options):
            super().__init__(*policy_args, **policy_options)
            dense = dict(self.named_parameters())
            sparsify(self, *args, **options)
            heirs = {id(dense[name]): parameter for name, parameter in self.named_parameters()}
            for _, network, optimizer, targets in trained(self):
                for group in optimizer.param_groups:
                    group["params"] = [heirs[id(parameter)] for parameter in group["params"]]
                for target in targets:
                    target.load_state_dict(network.state_dict())

    return SparsePolicy


def trained(policy):
    """Yield (name, network, optimizer, [target network]) of what is trained.

    That is the policy itself (PPO, A2C), its q_net (DQN), or its actor and critic (SAC, TD3).
    """
    nets = dict(policy.named_children())
    online = {name: net for name, net in nets.items() if name + "_target" in nets or hasattr(net, "optimizer")}
    for name, network in (online or {"policy": policy}).items():
        targets = [nets[name + "_target"]] if name + "_target" in nets else []
        yield name, network, getattr(network, "optimizer", None) or policy.optimizer, targets

"""RewireCallbacks in other people's training loops: when they step, what a checkpoint carries; saving and loading."""

import subprocess
import sys
from collections import OrderedDict

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import sparsekern as sk

FRAMEWORKS = ("transformers", "lightning", "stable_baselines3")


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_a_framework_that_is_not_installed_is_a_sentence(name):
    code = f"import sys; sys.modules[{name!r}] = None; import sparsekern as sk; sk.integrations.{name}"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert f"ImportError: sparsekern.integrations.{name} needs it: pip install" in run.stderr


def test_importing_sparsekern_imports_no_framework():
    code = f"import sys, sparsekern; assert not set({FRAMEWORKS}) & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_framework_is_an_attribute_error():
    assert not hasattr(sk.integrations, "keras")


def mlp() -> nn.Sequential:
    return sk.sparsify(nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)), 0.3, 8, keep="fresh")


def topologies(model: nn.Module) -> list[list[int]]:
    layers = [m for m in model.modules() if isinstance(m, sk.SparseLinear)]
    return [(l.topology.block_rows * 1000 + l.topology.block_cols).tolist() for l in layers]


def every(steps: int, kind=sk.SET):
    return lambda model, optimizer, followers=(): kind(model, optimizer, update_every=steps, followers=followers)


class Twin(torch.utils.data.Dataset):
    """Noise, and the same noise as what is to be learned."""

    def __init__(self, length: int):
        self.x = torch.randn(length, 32)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return {"x": self.x[i], "labels": self.x[i]}


# Hugging Face


class Autoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, x, labels):
        return {"loss": nn.functional.mse_loss(self.net(x), labels)}


def hugging_face(folder, callback, max_steps, resume=None, **options):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    torch.manual_seed(0)
    model, data = Autoencoder(), Twin(64)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=max_steps, per_device_train_batch_size=8, save_steps=4, report_to="none",
        use_cpu=True, disable_tqdm=True, learning_rate=1e-2, lr_scheduler_type="constant", logging_strategy="no",
        **options,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model, arguments, train_dataset=data, callbacks=callback if isinstance(callback, list) else [callback]
    )
    trainer.train(resume_from_checkpoint=resume)
    return model


def test_transformers_steps_the_rule_once_per_optimiser_step(tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed")
    callback = sk.integrations.transformers.RewireCallback(every(2))
    model = hugging_face(tmp_path, callback, 6, gradient_accumulation_steps=3)
    assert (callback.rule.clock, callback.rule.events) == (6, 3)
    assert set(callback.rule.layers) == {"net.0", "net.2"}
    assert callback.rule.layers["net.0"] is model.net[0]


@pytest.mark.parametrize("kind", [sk.SET, sk.RigL], ids=["SET", "RigL"])
def test_transformers_resumes_bit_for_bit(tmp_path, kind):
    pytest.importorskip("transformers", reason="transformers is not installed")
    callback = sk.integrations.transformers.RewireCallback
    whole = hugging_face(tmp_path, callback(every(3, kind)), 8)
    resumed = callback(every(3, kind))
    model = hugging_face(tmp_path, resumed, 8, resume=str(tmp_path / "checkpoint-4"))
    assert resumed.rule.clock == 8
    assert topologies(model) == topologies(whole)
    for value, other in zip(model.parameters(), whole.parameters(), strict=True):
        assert torch.equal(value, other)


def test_transformers_resumes_a_run_that_had_no_rule_and_saves(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    hugging_face(tmp_path, transformers.TrainerCallback(), 4)
    callback = sk.integrations.transformers.RewireCallback(every(2))
    hugging_face(tmp_path, callback, 8, resume=str(tmp_path / "checkpoint-4"))
    assert callback.rule.clock == 4
    again = sk.integrations.transformers.RewireCallback(every(2))
    hugging_face(tmp_path, again, 9, resume=str(tmp_path / "checkpoint-8"))
    assert again.rule.clock == 5


def test_transformers_takes_one_callback(tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed")
    callbacks = [sk.integrations.transformers.RewireCallback(every(2)) for _ in range(2)]
    with pytest.raises(ValueError, match="RewireCallback: a Trainer takes one, got 2"):
        hugging_face(tmp_path, callbacks, 2)


def test_transformers_begins_a_new_rule_for_another_trainer(tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed")
    callback = sk.integrations.transformers.RewireCallback(every(2))
    hugging_face(tmp_path, callback, 5)
    hugging_face(tmp_path, callback, 3)
    assert callback.rule.clock == 3


def test_transformers_refuses_a_callback_that_is_no_function():
    pytest.importorskip("transformers", reason="transformers is not installed")
    with pytest.raises(ValueError, match="make_rule must be a function, got None; leave restore_callback_states"):
        sk.integrations.transformers.RewireCallback(None)


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_save_pretrained_loads_in_two_lines(tmp_path, tied):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    load_file = pytest.importorskip("safetensors.torch", reason="safetensors is not installed").load_file
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=48, tie_word_embeddings=tied,
    )  # fmt: skip
    saved = sk.sparsify(transformers.AutoModelForCausalLM.from_config(config), 0.3).eval()
    saved.save_pretrained(tmp_path)

    config = transformers.AutoConfig.from_pretrained(tmp_path)
    model = sk.load(
        transformers.AutoModelForCausalLM.from_config(config), load_file(tmp_path / "model.safetensors")
    ).eval()

    tokens = torch.randint(0, 48, (2, 8))
    assert torch.equal(model(tokens).logits, saved(tokens).logits)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):  # a dense model refuses sparse weights
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


# Lightning


def lightning(folder, callback, max_steps, batches=1, resume=None, **options):
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def training_step(self, batch, index):
            return nn.functional.mse_loss(self.net(batch["x"]), batch["labels"])

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=1e-2)

    torch.manual_seed(0)
    module, loader = Module(), torch.utils.data.DataLoader(Twin(8 * batches), batch_size=8)
    checkpoints = lightning.pytorch.callbacks.ModelCheckpoint(folder, "{step}", every_n_train_steps=4, save_top_k=-1)
    trainer = lightning.Trainer(
        max_steps=max_steps, callbacks=[checkpoints, callback], accelerator="cpu", logger=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder, **options,
    )  # fmt: skip
    trainer.fit(module, loader, ckpt_path=resume)
    return module


def test_lightning_steps_the_rule_once_per_optimiser_step(tmp_path):
    pytest.importorskip("lightning", reason="lightning is not installed")
    callback = sk.integrations.lightning.RewireCallback(every(2))
    lightning(tmp_path, callback, 6, batches=18, accumulate_grad_batches=3)
    assert (callback.rule.clock, callback.rule.events) == (6, 3)


def test_lightning_counts_a_batch_of_several_optimisers_once(tmp_path):
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")

    class Two(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.automatic_optimization = mlp(), mlp(), False

        def training_step(self, batch, index):
            for net, optimizer in zip((self.first, self.second), self.optimizers(), strict=True):
                optimizer.zero_grad()
                self.manual_backward(nn.functional.mse_loss(net(batch["x"]), batch["labels"]))
                optimizer.step()

        def configure_optimizers(self):
            return [torch.optim.Adam(net.parameters(), lr=1e-2) for net in (self.first, self.second)]

    callback = sk.integrations.lightning.RewireCallback(every(2))
    trainer = lightning.Trainer(
        max_epochs=1, callbacks=[callback], accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(Two(), torch.utils.data.DataLoader(Twin(32), batch_size=8))
    assert (callback.rule.clock, callback.rule.events, len(callback.rule.layers)) == (4, 2, 4)


@pytest.mark.parametrize("kind", [sk.SET, sk.RigL], ids=["SET", "RigL"])
def test_lightning_resumes_bit_for_bit(tmp_path, kind):
    pytest.importorskip("lightning", reason="lightning is not installed")
    callback = sk.integrations.lightning.RewireCallback
    # one batch an epoch, since Lightning does not resume within an epoch of a plain loader
    whole = lightning(tmp_path, callback(every(3, kind)), 8)
    resumed = callback(every(3, kind))
    module = lightning(tmp_path, resumed, 8, resume=tmp_path / "step=4.ckpt")
    assert resumed.rule.clock == 8
    assert topologies(module) == topologies(whole)
    for value, other in zip(module.parameters(), whole.parameters(), strict=True):
        assert torch.equal(value, other)


# Stable-Baselines3


def stable_baselines3(name: str, **options):
    sb3 = pytest.importorskip("stable_baselines3", reason="stable-baselines3 is not installed")
    algorithm = getattr(sb3, name)
    policy = algorithm.policy_aliases["MlpPolicy"]
    sparse = sk.integrations.stable_baselines3.sparse_policy(policy, 0.3, 8, keep="fresh")
    env = "CartPole-v1" if name in ("PPO", "DQN") else "Pendulum-v1"
    return algorithm(sparse, env, seed=0, device="cpu", policy_kwargs={"net_arch": [32, 32]}, **options)


OFF = {"learning_starts": 8, "buffer_size": 200, "batch_size": 8}
# options, environment steps, and the clock of each network's rule after a first and a second `learn` of so many steps
CASES = {
    "PPO": ({"n_steps": 32, "batch_size": 16, "n_epochs": 2}, 64, {"policy": (8, 16)}),
    "DQN": (OFF | {"train_freq": 4, "target_update_interval": 10}, 40, {"q_net": (8, 18)}),
    "SAC": (OFF, 20, {"actor": (12, 32), "critic": (12, 32)}),
    "TD3": (OFF, 20, {"actor": (6, 16), "critic": (12, 32)}),
}


@pytest.mark.parametrize("name", CASES)
def test_stable_baselines3_rewires_saves_and_loads(tmp_path, name):
    options, steps, clocks = CASES[name]
    model = stable_baselines3(name, **options)
    callback = sk.integrations.stable_baselines3.RewireCallback(every(3))
    model.learn(steps, callback=callback)
    assert {name: rule.clock for name, rule in callback.rules.items()} == {name: c[0] for name, c in clocks.items()}
    assert all(rule.events for rule in callback.rules.values())
    for name_, net in model.policy.named_children():
        if name_ + "_target" in dict(model.policy.named_children()):
            assert topologies(net) == topologies(getattr(model.policy, name_ + "_target")) != []

    model.save(tmp_path / "model")
    loaded = type(model).load(tmp_path / "model", env=model.get_env())
    assert topologies(loaded.policy) == topologies(model.policy) != []
    observation = model.get_env().reset()
    assert (
        loaded.predict(observation, deterministic=True)[0] == model.predict(observation, deterministic=True)[0]
    ).all()

    again = sk.integrations.stable_baselines3.RewireCallback(every(3))
    loaded.learn(steps, callback=again, reset_num_timesteps=False)
    assert {name: rule.clock for name, rule in again.rules.items()} == {name: c[1] for name, c in clocks.items()}
    assert all(not optimizer._optimizer_step_post_hooks for optimizer in optimizers(loaded.policy))


def optimizers(policy: nn.Module) -> list:
    return [module.optimizer for module in policy.modules() if hasattr(module, "optimizer")]


def test_stable_baselines3_steps_no_rule_of_an_interrupted_learn():
    model = stable_baselines3("PPO", n_steps=32, batch_size=16, n_epochs=2)
    make = sk.integrations.stable_baselines3.RewireCallback

    class Interrupted(make):
        def _on_rollout_end(self):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.learn(32, callback=(first := Interrupted(every(3))))
    model.learn(32, callback=(second := make(every(3))))
    assert (first.rules["policy"].clock, second.rules["policy"].clock) == (0, 4)


def test_stable_baselines3_refuses_a_dense_policy():
    sb3 = pytest.importorskip("stable_baselines3", reason="stable-baselines3 is not installed")
    with pytest.raises(ValueError, match="SET: the model has no sparse layers"):
        sb3.PPO("MlpPolicy", "CartPole-v1", n_steps=8, batch_size=8, device="cpu").learn(
            8, callback=sk.integrations.stable_baselines3.RewireCallback(every(3))
        )


def test_stable_baselines3_optimises_every_parameter_of_a_sparse_policy():
    policy = stable_baselines3("PPO").policy
    assert len(topologies(policy)) == 2  # the layers of 4 inputs and of 2 and 1 outputs would be mostly padding
    assert {id(p) for p in policy.parameters()} == {id(p) for p in policy.optimizer.param_groups[0]["params"]}


# Clients that need no callback


def train(model: nn.Module, optimizer, rule, steps: int) -> None:
    x = torch.linspace(-1, 1, 256).view(8, 32)
    for _ in range(steps):
        (model(x) - x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        rule.step()


def adam_and_set(model: nn.Module) -> tuple:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    return model, optimizer, sk.SET(model, optimizer, update_every=2)


def assert_same(model: nn.Module, other: nn.Module) -> None:
    assert topologies(model) == topologies(other) != []
    for value, expected in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(value, expected)


def test_distributed_checkpoint_resumes_bit_for_bit(tmp_path):
    model, optimizer, rule = adam_and_set(mlp())
    train(model, optimizer, rule, 5)
    states = get_state_dict(model, optimizer)
    dcp.save({"model": states[0], "optimizer": states[1], "rule": rule.state_dict()}, checkpoint_id=tmp_path)
    train(model, optimizer, rule, 5)

    resumed, optimizer, rule = adam_and_set(mlp())
    states = get_state_dict(resumed, optimizer)
    state = {"model": states[0], "optimizer": states[1], "rule": rule.state_dict()}
    dcp.load(state, checkpoint_id=tmp_path)
    set_state_dict(resumed, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    rule.load_state_dict(state["rule"])
    train(resumed, optimizer, rule, 5)
    assert rule.clock == 10
    assert_same(resumed, model)


def test_accelerate_saves_and_loads_a_registered_rule(tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")

    def prepared():
        accelerator = accelerate.Accelerator(cpu=True)
        model = mlp()
        model, optimizer = accelerator.prepare(model, torch.optim.Adam(model.parameters(), lr=1e-2))
        rule = sk.SET(model, optimizer, update_every=2)
        accelerator.register_for_checkpointing(rule)
        return accelerator, model, optimizer, rule

    accelerator, *whole = prepared()
    train(*whole, 5)
    accelerator.save_state(str(tmp_path))
    train(*whole, 5)
    accelerator, *resumed = prepared()
    accelerator.load_state(str(tmp_path))
    train(*resumed, 5)
    assert resumed[2].clock == 10
    assert_same(resumed[0], whole[0])


def test_peft_adapts_dense_layers_and_refuses_sparse_ones():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    dense = peft.get_peft_model(sk.densify(mlp()), peft.LoraConfig(target_modules=["0"]))
    assert any("lora_A" in name for name, _ in dense.named_parameters())
    mixed = nn.Sequential(OrderedDict(body=mlp(), head=nn.Linear(32, 32)))
    mixed = peft.get_peft_model(mixed, peft.LoraConfig(target_modules=["head"]))
    mixed(torch.randn(3, 32)).sum().backward()
    trained = {name for name, parameter in mixed.named_parameters() if parameter.grad is not None}
    assert trained and all("head.lora" in name for name in trained)  # peft freezes the sparse layers
    with pytest.raises(ValueError, match="Target module SparseLinear"):
        peft.get_peft_model(mlp(), peft.LoraConfig(target_modules=["0"]))


def test_timm_models_become_sparse_with_their_optimiser_and_average():
    timm = pytest.importorskip("timm", reason="timm is not installed")
    from timm.optim import create_optimizer_v2
    from timm.utils import ModelEmaV3

    build = {"model_name": "vit_tiny_patch16_224", "img_size": 32, "num_classes": 10, "depth": 1}
    model = sk.sparsify(timm.create_model(**build), 0.2, keep="fresh")
    average = ModelEmaV3(model, decay=0.9)
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3)
    rule = sk.RigL(model, optimizer, update_every=2, followers=[average])
    for _ in range(4):
        model(torch.randn(2, 3, 32, 32)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update(model)
        rule.step()
    assert rule.events == 2 and len(topologies(model)) == 4
    assert topologies(average) == topologies(model)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(sk.load(timm.create_model(**build), model.state_dict()).eval()(x), model.eval()(x))


def torchrl_networks() -> tuple:
    pytest.importorskip("torchrl", reason="torchrl is not installed")
    from tensordict.nn import TensorDictModule
    from torchrl.data import Bounded
    from torchrl.modules import NormalParamExtractor, ProbabilisticActor, TanhNormal, ValueOperator

    def net(inputs: int, outputs: int) -> nn.Sequential:
        dense = nn.Sequential(nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, outputs))
        return sk.sparsify(dense, 0.3, 8, exclude=["2"], keep="fresh")

    class Critic(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net(40, 1)

        def forward(self, observation, action):
            return self.net(torch.cat((observation, action), dim=-1))

    actor = ProbabilisticActor(
        TensorDictModule(nn.Sequential(net(32, 16), NormalParamExtractor()), ["observation"], ["loc", "scale"]),
        ["loc", "scale"], spec=Bounded(-1, 1, (8,)), distribution_class=TanhNormal, return_log_prob=True,
    )  # fmt: skip
    critic = ValueOperator(Critic(), in_keys=["observation", "action"])
    return actor, critic, ValueOperator(net(32, 1), in_keys=["observation"])


def torchrl_batch(*shape: int):
    from tensordict import TensorDict

    done = torch.zeros(*shape, 1, dtype=torch.bool)
    following = {"observation": torch.randn(*shape, 32), "reward": torch.randn(*shape, 1)}
    batch = {"observation": torch.randn(*shape, 32), "action": torch.rand(*shape, 8) - 0.5}
    return TensorDict(batch | {"next": following | {"done": done, "terminated": done.clone()}}, shape)


def test_torchrl_trains_sac_on_a_sparse_ensemble_and_the_actor_can_be_rewired():
    actor, critic, _ = torchrl_networks()
    from torchrl.objectives import SACLoss, SoftUpdate

    loss = SACLoss(actor, critic, num_qvalue_nets=2)
    update = SoftUpdate(loss, eps=0.9)
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-3)
    rule = sk.SET(actor, optimizer, update_every=2)
    batch, before = torchrl_batch(16), topologies(actor)
    for _ in range(4):
        losses = loss(batch)
        optimizer.zero_grad()
        sum(value for name, value in losses.items() if name.startswith("loss")).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in loss.parameters())
        optimizer.step()
        update.step()
        rule.step()
    assert topologies(actor) != before
    with loss.actor_network_params.to_module(loss.actor_network):  # as the loss calls it
        seen = loss.actor_network(batch.select("observation"))["loc"]
    assert torch.equal(seen, actor(batch.select("observation"))["loc"])
    with pytest.raises(ValueError, match="the optimiser does not hold the weight"):  # one weight for two critics
        sk.SET(loss.qvalue_network, optimizer)


def test_torchrl_trains_ppo_with_advantages_while_a_rule_rewires():
    actor, _, value = torchrl_networks()
    from torchrl.objectives import ClipPPOLoss
    from torchrl.objectives.value import GAE

    batch = torchrl_batch(4, 16)
    with torch.no_grad():
        batch = actor(batch).exclude("loc", "scale")
    GAE(gamma=0.99, lmbda=0.95, value_network=value)(batch)
    loss = ClipPPOLoss(actor, value, entropy_coeff=0.01)
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-3)
    rule = sk.SET(nn.ModuleList([actor, value]), optimizer, update_every=2)
    for _ in range(4):
        losses = loss(batch.detach())
        optimizer.zero_grad()
        sum(value for name, value in losses.items() if name.startswith("loss")).backward()
        optimizer.step()
        rule.step()
    assert rule.events == 2 and len(rule.layers) == 2
    assert all(p.isfinite().all() for p in loss.parameters())

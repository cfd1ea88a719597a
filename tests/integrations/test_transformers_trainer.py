"""transformers' Trainer with selection: sigma, freeze, cap, resumption."""

import pytest
import torch

import stts_slowfast as stts
from tests.hosts.examples import timesformer, videomae, vivit

pytest.importorskip("accelerate", reason="accelerate, which Trainer needs, is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")

from transformers import Trainer, TrainingArguments  # noqa: E402

from stts_slowfast.integrations.transformers_trainer import SelectionCallback  # noqa: E402


class Clips(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        draw = torch.Generator().manual_seed(index)
        return {"pixel_values": torch.randn(8, 3, 32, 32, generator=draw), "labels": index % 5}


class Watch(transformers.TrainerCallback):
    """Copies the parameters after each step, and the rates that it was made with."""

    def __init__(self):
        self.parameters, self.rates, self.sigmas = [], [], []

    def on_train_begin(self, args, state, control, optimizer=None, **what):
        optimizer.optimizer.register_step_pre_hook(self.note)  # after the callback's own

    def note(self, optimizer, *_):
        self.rates.append({group["backbone"]: group["lr"] for group in optimizer.param_groups})

    def on_pre_optimizer_step(self, args, state, control, model=None, **what):
        self.sigmas.append(round(model.stts["time_0"].sigma, 6))

    def on_step_end(self, args, state, control, model=None, **what):
        self.parameters.append({k: v.clone() for k, v in model.state_dict().items()})


def train(folder, trained=True, resume=None, split=True, teacher="mixture", **more):
    model = timesformer().model
    stts.attach(
        model,
        time={0: 0.5},
        space={2: 0.6},
        teacher=teacher,
        num_samples=20,
        sigma=0.4,
        freeze_backbone_epochs=1.0,
        backbone_lr=0.25,
        fused_attention=False,
    )
    args = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to=[],
        save_strategy="steps",
        save_steps=5,
        use_cpu=True,
        disable_tqdm=True,
        **more,
    )
    selection, watch = SelectionCallback(model, trained), Watch()
    trainer = Trainer(
        model,
        args,
        train_dataset=Clips(),
        callbacks=[selection, watch],
        optimizer_cls_and_kwargs=selection.optimizer(args) if split else None,
    )
    trainer.train(resume_from_checkpoint=resume)
    return watch, trainer


def moved(before, after):
    """Which of backbone (False) and selectors (True) changed."""
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    return {key.startswith("stts.") for key in changed}


@pytest.mark.parametrize("teacher", ["mixture", "saliency"])
def test_sigma_freeze_and_cap(tmp_path, teacher):
    watch, trainer = train(tmp_path, teacher=teacher)
    assert watch.sigmas == [0.4, 0.35, 0.3, 0.25, 0.2, 0.15, 0.1, 0.05]
    assert watch.rates[:4] == [{True: 0.0, False: 1e-2}] * 4
    assert watch.rates[4:] == [{True: 2.5e-3, False: 1e-2}] * 4
    steps = watch.parameters
    assert moved(steps[0], steps[3]) == {True}
    assert moved(steps[3], steps[7]) == {True, False}
    logged = [log for log in trainer.state.log_history if "loss" in log]
    assert [round(log["sigma"], 6) for log in logged] == watch.sigmas
    assert [log["backbone_lr"] for log in logged] == [rates[True] for rates in watch.rates]


def test_a_step_that_the_trainer_skipped_is_taken_again_at_its_rates(tmp_path):
    """If gradients overflow, the schedule does not advance, and rates are those that we set."""
    watch, trainer = train(tmp_path)
    selection = next(c for c in trainer.callback_handler.callbacks if hasattr(c, "_split"))
    trainer.state.global_step = 1
    for _ in range(2):
        selection.on_step_begin(trainer.args, trainer.state, None, optimizer=trainer.optimizer)
        trainer.optimizer.optimizer.step()
        assert watch.rates.pop() == {True: 0.0, False: 1e-2}


def test_from_random_weights_everything_learns(tmp_path):
    watch, _ = train(tmp_path, trained=None)
    assert watch.rates == [{True: 1e-2, False: 1e-2}] * 8


def test_accumulated_steps_count_once(tmp_path):
    watch, _ = train(tmp_path, gradient_accumulation_steps=2)
    assert watch.sigmas == [0.4, 0.3, 0.2, 0.1]
    assert [rates[True] for rates in watch.rates] == [0.0, 0.0, 2.5e-3, 2.5e-3]


def test_a_resumed_run_is_what_it_was(tmp_path):
    whole, _ = train(tmp_path)
    rest, _ = train(tmp_path, trained=False, resume=str(tmp_path / "checkpoint-5"))
    assert rest.sigmas == whole.sigmas[5:] and rest.rates == whole.rates[5:]
    for key, value in whole.parameters[-1].items():
        torch.testing.assert_close(rest.parameters[-1][key], value, msg=key)


def test_an_optimizer_that_mixes_scorers_and_backbone_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"optimizer_cls_and_kwargs=callback\.optimizer\(args\)"):
        train(tmp_path, split=False)


def test_a_model_without_selectors_is_refused():
    with pytest.raises(ValueError, match=r"call attach\(model"):
        SelectionCallback(timesformer().model)


@pytest.mark.parametrize("example", [videomae, vivit])
def test_what_the_trainer_restores_has_the_models_names(tmp_path, example):
    """Stock ``Trainer`` leaves tensors of both as they are: what was saved has other names."""
    model = stts.attach(example().model, time={0: 0.5})
    SelectionCallback(model)
    folder = tmp_path / "saved"
    model.save_pretrained(folder)
    own = {key: value.clone() for key, value in model.state_dict().items()}
    written = safetensors.load_file(folder / "model.safetensors")
    assert written.keys() - own.keys()
    for parameter in model.parameters():
        parameter.data.zero_()
    assert not model.load_state_dict(written, strict=False).missing_keys
    for key, value in model.state_dict().items():
        assert torch.equal(value, own[key]), key


def run(folder, model, callback, epochs=1, resume=None, **more):
    args = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **{"save_strategy": "epoch", "eval_strategy": "no", **more},
    )
    trainer = Trainer(
        model,
        args,
        train_dataset=Clips(),
        eval_dataset=torch.utils.data.Subset(Clips(), [0, 1]),
        callbacks=[callback],
        optimizer_cls_and_kwargs=callback.optimizer(args),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_a_resumed_run_and_the_best_model_are_restored_whole(tmp_path):
    def attached():
        return stts.attach(vivit().model, time={0: 0.5}, freeze_backbone_epochs=0)

    best = {"load_best_model_at_end": True, "eval_strategy": "epoch"}
    whole = attached()
    trainer = run(tmp_path / "a", whole, SelectionCallback(whole), epochs=2, **best)
    folder = trainer.state.best_model_checkpoint
    saved = safetensors.load_file(f"{folder}/model.safetensors")
    key = "vivit.encoder.layer.0.attention.attention.query.weight"
    assert torch.equal(whole.vivit.layers[0].attention.q_proj.weight, saved[key])
    model = attached()
    run(tmp_path / "b", model, SelectionCallback(model), 2, str(tmp_path / "a" / "checkpoint-2"))
    last = safetensors.load_file(tmp_path / "a" / "checkpoint-4" / "model.safetensors")
    torch.testing.assert_close(model.vivit.layers[0].attention.q_proj.weight, last[key])


def test_what_was_not_restored_is_named(tmp_path):
    model = stts.attach(vivit().model, time={0: 0.5})
    trainer = run(tmp_path, model, SelectionCallback(model))
    path = tmp_path / f"checkpoint-{trainer.state.global_step}"
    state = safetensors.load_file(path / "model.safetensors")
    del state["vivit.layernorm.weight"]
    safetensors.save_file(state, path / "model.safetensors")
    with pytest.raises(ValueError, match=r"not restored 1 tensors .*vivit\.layernorm\.weight"):
        run(tmp_path, model, SelectionCallback(model), 2, str(path))


def test_a_new_head_learns_from_the_first_step(tmp_path):
    """Where a trained backbone is frozen: else scorers learn against a head that is random."""
    videomae().model.save_pretrained(tmp_path / "base")
    model = transformers.VideoMAEForVideoClassification.from_pretrained(
        tmp_path / "base", num_labels=7, ignore_mismatched_sizes=True
    )
    stts.attach(model.videomae, time={0: 0.5})  # three epochs are frozen
    callback = SelectionCallback(model)
    assert callback.trained
    before = {key: value.clone() for key, value in model.state_dict().items()}
    run(tmp_path, model, callback, save_strategy="no")
    changed = {key for key in before if not torch.equal(before[key], model.state_dict()[key])}
    assert {"classifier.weight", "classifier.bias"} <= changed
    assert all(key.startswith(("classifier.", "videomae.stts.")) for key in changed)

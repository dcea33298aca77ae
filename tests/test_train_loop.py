"""Parts of the training loop: schedules, draws, checkpoints, averages, options."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from visar.core.condition import Condition
from visar.io.files import replaced_folder
from visar.train.checkpoint import CheckpointStore, check_same_options
from visar.train.conditions import ConditionDropout
from visar.train.log import RunLog
from visar.train.loop import check_finite, update_average
from visar.train.options import RunOptions, TrainGenerator, TrainTokenizer, check_run_options
from visar.train.randomness import Draw, IndexDraws, StepRandom, balanced_weights
from visar.train.recipes import RECIPES
from visar.train.run import Averages, fast_math
from visar.train.schedule import Schedule, schedule_factor
from visar.train.tokenizer import build_tokenizer

CPU = torch.device("cpu")

# A name here is part of commands that people have written down: add, do not rename.
RUN_OPTIONS = """
    out skip_unreadable initial steps batch_size gradient_accumulation gradient_checkpointing learning_rate schedule
    warmup_steps decay_steps final_fraction clip_norm ema_decay seed mixed_precision compile tf32 device log_every
    validate_every sample_every save_every keep_checkpoints resume max_minutes tracker
""".split()
TOKENIZER_OPTIONS = """
    data image_size kind preset model_options codebook_size codebook_update codebook_decay commitment_weight
    codebook_weight kl_weight flow_weight revive_every revive_below revive_until l1_weight l2_weight gradient_weight
    perceptual_weight perceptual adversarial_weight adversarial_start adversarial_learning_rate adversarial_layers
    adversarial_spectral adversarial_adaptive adversarial_maximum decoder_only weight_decay augment save_dtype
""".split()
GENERATOR_OPTIONS = """
    data tokenizer tokens variants augment token_means family phase width num_layers num_heads hidden_width
    model_options class_condition attributes words text_encoder dropout label_dropout class_dropout attribute_dropout
    word_dropout word_omission class_balance scale_weights self_correction initial_layers teacher
    weight_decay optimizer sample_images sample_guidance save_dtype
""".split()


# ----------------------------------------------------------------------------------------------------------- options
def test_option_names_are_frozen():
    def names(options_class: type) -> list[str]:
        return [field.name for field in dataclasses.fields(options_class)]

    assert names(RunOptions) == RUN_OPTIONS
    assert names(TrainTokenizer) == RUN_OPTIONS + TOKENIZER_OPTIONS
    assert names(TrainGenerator) == RUN_OPTIONS + GENERATOR_OPTIONS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(steps=0), "steps 0"),
        (dict(batch_size=6), "batch_size 6 must be a multiple of 2 processes x 2"),
        (dict(ema_decay=1.0), "ema_decay 1.0"),
        (dict(schedule="wsd"), "decay_steps 0"),
        (dict(schedule="linear"), "schedule 'linear'; choose constant, cosine or wsd"),
        (dict(warmup_steps=11), "warmup_steps 11"),
    ],
)
def test_options_out_of_range(changes, message):
    options = RunOptions(**{**dict(out=Path("x"), steps=10, batch_size=8, gradient_accumulation=2), **changes})
    with pytest.raises(ValueError, match=message):
        check_run_options(options, num_processes=2)


def test_recipes_build_and_fit_their_files():
    # 16 MiB of bfloat16
    for name, options in RECIPES.items():
        check_run_options(options, 1)
        if isinstance(options, TrainTokenizer):
            with torch.device("meta"):
                model = build_tokenizer(options, 64)
            assert model.layout.shapes[-1] in ((16, 16), (64,)), name
            assert sum(parameter.numel() for parameter in model.parameters()) * 2 < 16 * 2**20, name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(preset="vq-5"), "preset 'vq-5'; choose vq-16"),
        (dict(model_options="{base}"), "is no JSON"),
        (dict(model_options='{"wide": 3}'), "does not take these model_options.*wide"),
    ],
)
def test_architectures_that_do_not_exist(changes, message):
    options = TrainTokenizer(**{**dict(out=Path("x"), data=Path("x")), **changes})
    with pytest.raises(ValueError, match=message):
        build_tokenizer(options, 64)


# ---------------------------------------------------------------------------------------------------------- schedules
def test_schedules():
    def factors(schedule: Schedule, **settings: Any) -> list[float]:
        return [schedule_factor(step, schedule=schedule, steps=10, **settings) for step in range(10)]

    assert factors("constant", warmup_steps=2) == [0.5] + [1.0] * 9
    assert factors("wsd", warmup_steps=2, decay_steps=4, final_fraction=0.2) == pytest.approx(
        [0.5, 1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4]
    )
    cosine = factors("cosine", final_fraction=0.1)
    assert cosine[0] == 1.0 and cosine[5] == pytest.approx(0.55)
    assert all(after < before for before, after in zip(cosine, cosine[1:], strict=False)) and cosine[-1] > 0.1


# --------------------------------------------------------------------------------------------------------- randomness
def test_draws_depend_on_step_use_and_process():
    def numbers(process: int, step: int, use: Draw, **settings) -> list[float]:
        generator = StepRandom(5, process, CPU).generator(step, use, **settings)
        return torch.rand(3, generator=generator).tolist()

    first = numbers(0, 7, Draw.DATA)
    assert first == numbers(0, 7, Draw.DATA) == numbers(1, 7, Draw.DATA, shared=True)
    others = [numbers(1, 7, Draw.DATA), numbers(0, 8, Draw.DATA), numbers(0, 7, Draw.AUGMENT)]
    others.append(numbers(0, 7, Draw.DATA, part=1))
    assert all(first != other for other in others)


def test_index_draws_follow_their_weights():
    class_N = torch.tensor([0] * 16 + [1] * 4)
    draws = IndexDraws(20, balanced_weights(class_N, 0.5), CPU)
    index = draws.draw(40_000, torch.Generator().manual_seed(0))
    # Class sizes 16 and 4 with weight n^-0.5: shares 4 : 2.
    share = (class_N[index] == 0).float().mean().item()
    assert share == pytest.approx(2 / 3, abs=0.01)
    assert (torch.bincount(index[index < 16], minlength=16) / 40_000).tolist() == pytest.approx(
        [1 / 24] * 16, abs=0.004
    )
    with pytest.raises(ValueError, match="power 1.5"):
        balanced_weights(class_N, 1.5)
    with pytest.raises(ValueError, match="no image"):
        IndexDraws(0, None, CPU)


def test_conditions_are_dropped_together_and_each():
    count = 20_000
    labels = torch.tensor([[3, 1, 0]]).expand(count, -1)
    words = torch.tensor([[5, 6, 0]]).expand(count, -1)
    dropout = ConditionDropout([9, 4, 2], together=0.2, label_rates=[0.0, 0.5, 0.1], word_rate=0.25, device=CPU)
    dropped = dropout(Condition(labels_BA=labels, words_BT=words), torch.Generator().manual_seed(0))
    assert dropped.labels_BA is not None and dropped.words_BT is not None
    lost = dropped.labels_BA != labels
    assert dropped.labels_BA[lost].unique().tolist() == [2, 4, 9]
    assert lost.float().mean(0).tolist() == pytest.approx([0.2, 0.6, 0.28], abs=0.015)
    no_words = (dropped.words_BT == torch.tensor([1, 0, 0])).all(1)
    assert no_words.float().mean().item() == pytest.approx(0.4, abs=0.015)
    assert bool((dropped.words_BT[~no_words] == words[0]).all())
    # The class is lost only together with everything.
    assert bool((lost[:, 0] <= (lost.all(1) & no_words)).all())
    with pytest.raises(ValueError, match="chance 1.5"):
        ConditionDropout([9], together=1.5, label_rates=[0.0], word_rate=0.0, device=CPU)


def test_single_words_are_left_out():
    words = torch.tensor([[5, 6, 7, 0], [8, 0, 0, 0]]).repeat(4000, 1)
    dropout = ConditionDropout([], together=0.0, label_rates=[], word_rate=0.0, omit_rate=0.5, device=CPU)
    kept = dropout(Condition(words_BT=words), torch.Generator().manual_seed(0)).words_BT
    assert kept is not None
    # A caption that would be empty (1 in 8 of three words) stays whole; no word is left out of one that has one.
    captions, counts = kept[::2].unique(dim=0, return_counts=True)
    shares = {tuple(row): count / 4000 for row, count in zip(captions.tolist(), counts.tolist(), strict=True)}
    assert shares.keys() == {
        (5, 6, 7, 0), (5, 6, 0, 0), (5, 7, 0, 0), (6, 7, 0, 0), (5, 0, 0, 0), (6, 0, 0, 0), (7, 0, 0, 0)
    }  # fmt: skip
    assert shares[5, 6, 7, 0] == pytest.approx(0.25, abs=0.03) and shares[6, 0, 0, 0] == pytest.approx(0.125, abs=0.03)
    assert torch.equal(kept[1::2], words[1::2])


# -------------------------------------------------------------------------------------------------------- checkpoints
def test_checkpoints_keep_the_newest(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    for step in (2, 4, 6):
        store.save(step, {"step": step, "weight": torch.full((2,), float(step))}, {"seed": 1})
    (tmp_path / ".step-00000008.part").mkdir()  # what a run that was killed while writing leaves
    assert store.steps() == [4, 6]
    store.remove_parts()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000004", "step-00000006"]
    assert store.load(6)["weight"].tolist() == [6.0, 6.0] and store.config(6) == {"seed": 1}
    state = tmp_path / "step-00000006" / "state.pt"
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(ValueError, match="step-00000006.*is damaged"):
        store.load(6)


def test_folder_is_replaced(tmp_path):
    for text in ("old", "new"):
        with replaced_folder(tmp_path / "model") as folder:
            (folder / "file").write_text(text)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "file").read_text() == "new"


def test_options_are_compared():
    options = RunOptions(out=Path("a"), steps=10)
    saved = {**dataclasses.asdict(options), "out": "b", "seed": 3}
    with pytest.raises(ValueError, match="seed: saved 3, given 0") as error:
        check_same_options(saved, options, {"out"}, Path("run"))
    assert "steps" not in str(error.value)
    check_same_options({**saved, "seed": 0}, options, {"out"}, Path("run"))


# --------------------------------------------------------------------------------------------------- averages and log
def test_averages_count_each_scalar():
    averages = Averages()
    averages.add({"loss": torch.tensor(1.0)})
    averages.add({"loss": torch.tensor(3.0), "adversarial": torch.tensor(5.0)})
    restored = Averages()
    restored.load_state_dict(averages.state_dict(), CPU)
    restored.add({"loss": torch.tensor(5.0)})
    assert {name: value.item() for name, value in restored.means().items()} == {"loss": 3.0, "adversarial": 5.0}


def test_losses_must_be_finite():
    check_finite({"loss": 1.0}, 5)
    with pytest.raises(ValueError, match="loss, norm not finite in the steps up to 5"):
        check_finite({"loss": float("nan"), "norm": float("inf"), "psnr": 3.0}, 5)


def test_moving_average_of_weights():
    model, averaged = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    with torch.no_grad():
        model.weight.fill_(3.0)
        model.running_mean.fill_(7.0)
    update_average(averaged, model, 0.75)
    assert averaged.weight.tolist() == [1.5, 1.5] and averaged.running_mean.tolist() == [7.0, 7.0]


def test_flags_are_put_back():
    def flags() -> tuple:
        cudnn = torch.backends.cudnn
        return torch.get_float32_matmul_precision(), cudnn.allow_tf32, cudnn.benchmark

    before = flags()
    with pytest.raises(KeyError), fast_math(True):
        assert flags() == ("high", True, True)
        raise KeyError
    assert flags() == before


class OneProcess:
    is_main_process = True


def test_log_drops_what_is_beyond_the_checkpoint(tmp_path):
    options = RunOptions(out=tmp_path, steps=10, tracker="none")
    log = RunLog(options, OneProcess(), 0)
    for step in (1, 2, 3):
        log.write(step, {"train/loss": float(step)})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "tra')
    RunLog(options, OneProcess(), 2)
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == [
        '{"step": 1, "train/loss": 1.0}',
        '{"step": 2, "train/loss": 2.0}',
    ]

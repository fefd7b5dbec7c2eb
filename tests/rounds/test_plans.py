"""What a method's rounds are, who may say what, and that no round of RECAP's ramp holds more than the last."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
from torch import nn

from recap_cli import registry
from recap_cli.core.method import Method, RoundPlan, Settings
from recap_cli.errors import PluginError, RecipeError
from recap_cli.memory import meta_model, predict
from recap_cli.memory.tracker import Kind
from recap_cli.rounds import plans
from recap_cli.rounds.plans import (
    check_steps,
    lr_window_of,
    method_of,
    method_of_name,
    round_plans_for,
    round_plans_of,
    steps_of,
)
from recap_cli.rounds.small_model import micro_batch_size_of
from recap_cli.state.manifest import Manifest
from tests.pico import LABELS
from tests.tiny import tiny

METHODS = registry.names("methods")
PLAIN = Settings(rounds=4, prune_ratio=0.333, mask_ratio=0.5, hold_plan=2, ramp=0.5)


def round_plans_with(name: str, **settings: Any) -> list[RoundPlan]:
    method = method_of_name(name)
    return list(method.round_plans(replace(PLAIN, options=method.options, **settings)))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_plans_round_plans_that_make_sense_and_says_what_it_is(name: str) -> None:
    recipe = tiny("vit", method=name, rounds=4)
    found = round_plans_for(recipe)
    method = method_of(recipe)
    assert sum(round_plan.share for round_plan in found) == pytest.approx(1.0)
    assert found[-1].product
    assert found[-1].lr_window[1] == pytest.approx(1.0)
    assert method.title.endswith(".")
    assert method.prunes == any(round_plan.prune_ratio > 0 for round_plan in found)
    assert method.masks == any(round_plan.mask_ratio > 0 for round_plan in found)
    if method.prunes:
        assert {round_plan.prune_ratio for round_plan in found if round_plan.product} == {0.4}


@pytest.mark.parametrize("name", METHODS)
def test_round_plans_are_kept_in_the_state_as_they_are(name: str) -> None:
    recipe = tiny("vit", method=name)
    planned = round_plans_for(recipe)
    manifest = Manifest(
        0, "init", "", history=[{"stage": "init", "round_plans": [round_plan.to_json() for round_plan in planned]}]
    )
    assert round_plans_of(manifest) == planned


@pytest.mark.parametrize("total", [1, 7, 10, 376])
def test_steps_add_up_to_the_total_however_they_are_shared(total: int) -> None:
    for shares in ([1.0], [0.5, 0.5], [0.7, 0.3], [1 / 3] * 3, [0.1] * 10):
        each = steps_of([RoundPlan(share=share) for share in shares], total)
        assert sum(each) == total
        assert all(abs(steps - share * total) <= 1 for steps, share in zip(each, shares, strict=True))


def test_the_faithful_recipe_is_the_papers_algorithm() -> None:
    recipe = tiny("vit", faithful=True, rounds=3)
    assert (recipe.head.warmup_epochs, recipe.prune.hold_plan, recipe.prune.ramp, recipe.finetune.lr_schedule_span) == (
        0,
        0.0,
        1.0,
        "round",
    )
    assert round_plans_for(recipe) == (RoundPlan(0.4, 0.6, share=1 / 3),) * 3
    with pytest.raises(RecipeError, match=r"prune.hold_plan  expected 0.0 with faithful: true"):
        tiny("vit", faithful=True, prune={"hold_plan": 0.5})
    with pytest.raises(RecipeError, match=r"prune.compensate  expected false with faithful: true.*; found auto"):
        tiny("vit", faithful=True, prune={"compensate": "auto"})


@pytest.mark.parametrize("mask_ratio", [0.0, 0.25, 0.5, 0.875, 0.95])
@pytest.mark.parametrize("prune_ratio", [0.1, 0.333, 0.5, 0.666])
@pytest.mark.parametrize("cost", [0.25, 1.0, 3.0, 8.0])
def test_no_round_of_the_ramp_holds_more_than_the_last(prune_ratio: float, mask_ratio: float, cost: float) -> None:
    found = round_plans_with("recap", rounds=10, hold_plan=5, prune_ratio=prune_ratio, mask_ratio=mask_ratio, entry_cost=cost)

    def held(round_plan: RoundPlan) -> float:
        return (1 - round_plan.prune_ratio) * (1 + cost * (1 - round_plan.mask_ratio))

    assert max(map(held, found)) == pytest.approx(held(found[-1]))
    ratios = [round_plan.prune_ratio for round_plan in found]
    assert ratios == sorted(ratios)
    assert ratios[0] < prune_ratio == ratios[4]
    assert [round_plan.plan for round_plan in found] == ["importance"] * 5 + ["same"] * 5
    assert [round_plan.product for round_plan in found] == [False] * 4 + [True] * 6
    parts = [round_plan.batch_parts for round_plan in found]
    assert all(part - 1 < (1 - ratio) / (1 - prune_ratio) - 1e-6 <= part for part, ratio in zip(parts, ratios, strict=True))


def test_without_a_ramp_or_rounds_to_ramp_over_every_round_has_the_ratios_asked_for() -> None:
    for settings in ({"ramp": 1.0}, {"rounds": 1, "hold_plan": 0}, {"rounds": 2, "hold_plan": 1}):
        assert {(round_plan.prune_ratio, round_plan.mask_ratio) for round_plan in round_plans_with("recap", **settings)} == {
            (0.333, 0.5)
        }


FUSED = {"fused_backward": True}
SETTINGS: list[dict[str, Any]] = [
    {},
    FUSED,
    {"optimizer": "sgd"},
    {"optimizer": "sgd", "momentum": 0.0, **FUSED},
    {"weights": "bf16"},
    {"weights": "bf16", "offload": True, **FUSED},
    {"weights": "int8", **FUSED},
    {"weights": "int8", "offload": True, **FUSED},
    {"weights": "nf4", **FUSED},
    {"offload": True, **FUSED},
]


@pytest.mark.parametrize(
    ("settings", "mask_ratio"),
    [*((settings, 0.5) for settings in SETTINGS), *((SETTINGS[at], 0.25) for at in (0, 3, 6))],  # most and least in fp32, int8
    ids=str,
)
def test_the_first_round_of_a_ramp_is_predicted_to_hold_no_more_than_the_last(settings: Any, mask_ratio: float) -> None:
    config = {"model_type": "vit", "hidden_size": 256, "num_hidden_layers": 1, "num_attention_heads": 16, "image_size": 16}
    model = {"config": {**config, "intermediate_size": 1024, "patch_size": 8, "num_channels": 3}}
    lean = {"batch_size": 1, **settings}  # of weights, gradients and state every micro-batch holds as much
    recipe = tiny("vit", rounds=4, model=model, mask={"ratio": mask_ratio}, finetune=lean)
    planned, of_recipe = round_plans_for(recipe), meta_model.of_recipe(recipe, LABELS)
    assert planned[0].mask_ratio > planned[-1].mask_ratio
    first, last = (predict._predicted(of_recipe, recipe, "recap", planned[at:], "cuda").usage.maxima for at in (0, 3))
    held: list[Kind] = ["weights", "optimizer"] if recipe.finetune.fused_backward else ["weights", "gradients", "optimizer"]
    assert sum(first[kind] for kind in held) <= 1.03 * sum(last[kind] for kind in held)


@pytest.mark.parametrize("settings", [{}, {"weights": "bf16"}, FUSED], ids=str)
def test_the_peak_of_the_first_round_is_no_higher_as_its_batches_are_taken_in_parts(settings: Any) -> None:
    config = {"model_type": "vit", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32}
    model = {"config": {**config, "intermediate_size": 256, "patch_size": 8, "num_channels": 3}}
    recipe = tiny("vit", rounds=4, model=model, finetune={"batch_size": 32, **settings})
    planned, of_recipe = round_plans_for(recipe), meta_model.of_recipe(recipe, LABELS)
    first, last = (predict._predicted(of_recipe, recipe, "recap", planned[at:], "cuda") for at in (0, 3))
    assert first.usage.peak_bytes <= 1.01 * last.usage.peak_bytes
    whole = [replace(planned[0], batch_parts=1), *planned[1:]]
    assert predict._predicted(of_recipe, recipe, "recap", whole, "cuda").usage.peak_bytes > 1.1 * last.usage.peak_bytes


def test_a_batch_is_taken_in_the_parts_of_its_round_or_in_smaller_ones() -> None:
    cases = ((32, None, 1, None), (32, None, 2, 16), (32, 8, 2, 4), (9, None, 2, 4), (8, 4, 2, 4), (7, None, 2, None))
    for size, micro, parts, expected in cases:
        recipe = tiny("vit", finetune={"batch_size": size, "micro_batch_size": micro})
        assert micro_batch_size_of(recipe, RoundPlan(batch_parts=parts), nn.Linear(1, 1)) == expected
        matched = nn.ModuleDict({"criterion": nn.Linear(1, 1)})  # the loss of its batch is none of the parts
        assert micro_batch_size_of(recipe, RoundPlan(batch_parts=parts), matched) == micro


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"method": "lora-ft", "options": {"rnak": 4}},
            r"options\.rnak: the method lora-ft has no such option; did you mean rank\?",
        ),
        ({"method": "lora-ft", "options": {"rank": "four"}}, r"options\.rank: expected something like 8; found four"),
        ({"method": "lora-ft", "options": {"rank": 0}}, r"options\.rank: expected a whole number of at least 1; found 0"),
        ({"method": "lora-ft", "options": {"targets": ["keys"]}}, r"options\.targets: expected some of query"),
        ({"method": "post-ft", "options": {"full_share": 1.5}}, r"options\.full_share: expected a number between 0 and 1"),
        ({"method": "pre-ft", "options": {"embeddings": "no"}}, r"options\.embeddings: expected something like true; found no"),
        ({"method": "movement", "options": {"scores_lr": -1.0}}, r"options\.scores_lr: expected a number above 0"),
        ({"method": "full-ft", "options": {"rank": 8}}, r"options\.rank: the method full-ft has no such option"),
    ],
)
def test_options_that_a_method_does_not_take_are_named_before_anything_runs(given: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said) as caught:
        round_plans_for(tiny("vit", **given))
    assert caught.value.hint


def test_a_round_that_would_take_no_step_is_refused() -> None:
    recipe = tiny("vit", method="post-ft")
    with pytest.raises(RecipeError, match="1 optimizer step is too few for the 2 rounds of post-ft: round 1 would have none"):
        check_steps(round_plans_for(recipe), 1, recipe)


def test_round_plans_that_follow_each_other_run_one_schedule_to_the_step() -> None:
    shares = [RoundPlan(share=1 / 3, lr_window=(n / 3, (n + 1) / 3)) for n in range(3)]
    each = steps_of(shares, 10)
    places = [lr_window_of(round_plan, sum(each[:n]), each[n], 10) for n, round_plan in enumerate(shares)]
    assert places == [(10, 0), (10, each[0]), (10, each[0] + each[1])]
    assert lr_window_of(RoundPlan(share=0.5), 5, 5, 10) == (5, 0)  # a course of its own


@pytest.mark.parametrize("embeddings", ["seen", None, 1])
def test_a_round_plan_whose_embeddings_are_neither_said_nor_tokens_is_refused(
    embeddings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plans, "method_of", lambda _: Method("", lambda _: [RoundPlan(embeddings=embeddings)]))
    with pytest.raises(PluginError, match=r"round 1 has embeddings=.*, which is none of True, False, 'tokens'"):
        round_plans_for(tiny("vit"))


def fail(_: Settings) -> Iterable[RoundPlan]:
    raise KeyError("x")


def forever(_: Settings) -> Iterable[RoundPlan]:
    while True:
        yield RoundPlan()


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (fail, "failed: KeyError"),
        (forever, "gives 10000 rounds"),
        (lambda _: [], "gives no rounds"),
        (lambda _: [RoundPlan(share=0.5)], "add up to 0.5, not to 1"),
        (lambda _: [RoundPlan(plan="same")], "round 1 has nothing to take a plan from"),
        (lambda _: [RoundPlan(product=False)], "none of its rounds gives the product"),
        (lambda _: [RoundPlan(prune_ratio=1.0)], "round 1 is out of range: prune_ratio 1"),
        (lambda _: [RoundPlan(trains="training")], "round 1 trains what a training says, and the method has none"),
        (lambda _: [RoundPlan(trains="heads")], "round 1 has trains='heads', which is none of mask, head, training"),
        (lambda _: [RoundPlan(plan="new")], "round 1 has plan='new', which is none of importance, same, learned"),
        (lambda _: [{"share": 1.0}], "round 1 is of type dict, not RoundPlan"),
        (lambda _: [RoundPlan(prune_ratio="a")], "round 1 has something else than numbers"),
        (lambda _: [RoundPlan(lr_window=(0.0, 0.5, 1.0))], "round 1 has something else than numbers"),
        (
            lambda _: [RoundPlan(0.4, share=0.5), RoundPlan(0.3, share=0.5, plan="same")],
            "round 2 keeps the plan and says another",
        ),
        (
            lambda _: [RoundPlan(share=0.5), RoundPlan(share=0.5, plan="learned")],
            "round 2 prunes by scores, and the round before it",
        ),
    ],
)
def test_a_strangers_round_plans_that_make_no_sense_are_refused(made: Any, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "method_of", lambda _: Method("A stranger's.", made))
    with pytest.raises(PluginError, match=said):
        round_plans_for(tiny("vit"))

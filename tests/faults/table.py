"""Named faults: what a hurried person might write, each with the tests that must fail on it.

`old` stands exactly once in `file`; `new` is put in its place. Of the tests that fail, `tests` names the smallest.
"""

from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PLAIN = "tests/stages/test_algorithm.py::"
SETTINGS = "tests/stages/test_algorithm_settings.py::"
PLAN = f"{PLAIN}test_every_plan_keeps_the_groups_of_the_highest_eq_1_through_all_gradual_steps[vit]"
TRAINED = f"{PLAIN}test_what_trains_is_trained_as_by_torch_on_dense_gradients_and_merged_and_all_else_ages[vit]"
ORDER = f"{PLAIN}test_the_order_of_examples_runs_through_all_rounds_epoch_after_epoch[vit]"
CHOSEN = f"{SETTINGS}test_every_example_of_a_last_short_batch_counts_as_much_in_the_importance_as_any_other"
ADAMW = f"{SETTINGS}test_a_single_round_trains_as_the_reference_does[adamw]"
SGD = f"{SETTINGS}test_a_single_round_trains_as_the_reference_does[sgd]"
PRODUCT = f"{SETTINGS}test_the_product_is_the_small_model_of_the_round_with_the_best_metric"
RAMP = f"{SETTINGS}test_a_round_that_is_pruned_less_than_the_last_is_no_product"
PATIENCE = f"{SETTINGS}test_patience_counts_the_rounds_since_the_best[values0-3-matthews]"
DRAWN = f"{SETTINGS}test_every_example_is_as_likely_in_d_s_as_any_other"
DROPOUT = f"{SETTINGS}test_dropout_is_for_training_alone"
WARM_UP = f"{SETTINGS}test_the_warm_up_trains_the_head_and_nothing_else_as_torch_would[deit]"
SAMPLE = "tests/data/test_sampling.py::test_a_sample_repeats_nothing"
SEEDS = "tests/data/test_sampling.py::test_seeds_are_the_same_everywhere_and_differ_by_each_argument"
NAIVE = "tests/core/test_importance.py::test_importance_is_that_of_a_naive_double_loop"
RISES = "tests/rounds/test_plans.py::test_no_round_of_the_ramp_holds_more_than_the_last[1.0-0.333-0.5]"
WORDS = "tests/training/test_loop.py::test_the_gradient_of_micro_batches_is_that_of_the_whole_batch[1-words]"
SHARES = "tests/rounds/test_importance.py::test_the_shares_of_d_s_are_those_of_what_the_task_counts"
EVALUATED = "tests/training/test_evaluation.py::test_the_loss_is_the_mean_over_all_words_however_they_are_batched"
GLOBAL = f"{SETTINGS}test_scopes_floors_and_criteria_choose_what_the_reference_chooses[global-bert]"

CUT = "tests/stages/test_compensation.py::"
SHARED = f"{CUT}test_each_gradual_step_scores_what_the_one_before_has_absorbed_and_absorbs_by_least_squares"
WRITTEN_BACK = f"{CUT}test_a_merge_writes_what_was_trained_less_the_change_and_leaves_every_other_bit[1-bert]"
HIDDEN = (
    "tests/stages/test_hidden_states.py::"
    "test_what_is_kept_are_the_averages_of_what_each_block_of_the_teacher_gives[text-classification]"
)
HIDDEN_ROWS = (
    "tests/stages/test_hidden_states.py::test_an_example_counts_as_often_as_it_has_rows_so_that_parts_add_up_to_the_batch"
)
OWN_TEACHER = (
    "tests/stages/test_own_teacher.py::"
    "test_the_teacher_is_the_full_model_as_torch_trains_it_and_the_others_begin_there[full-vit]"
)
WANDA = "tests/core/test_importance.py::test_wanda_scores_the_rows_of_what_no_layer_reads_and_refuses_what_is_no_matrix"
IN_STEPS = "tests/core/test_gradual.py::test_a_weight_that_both_steps_cut_has_both_changes_and_the_full_model_neither"
ONCE = "tests/trainable/test_kept_once.py::"
RIDGE = "tests/core/test_compensation.py::test_the_ridge_is_the_one_that_leaves_least_where_it_was_not_fitted"


class Fault(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def changed(self, text: str | None = None) -> str:
        """The file's text (or this one) with the fault in it. Raises `ValueError` unless the old text is there just once."""
        text = (ROOT / self.file).read_text(encoding="utf-8") if text is None else text
        if (found := text.count(self.old)) != 1:
            raise ValueError(f"{self.name}: {self.file} has the text {self.old!r} {found} times, not once: mend the table")
        return text.replace(self.old, self.new)


FAULTS = (
    Fault(
        "the mask keeps the least important groups",
        "recap_cli/rounds/masking.py",
        "recipe, axes, shapes, scores, 1.0 - round_plan.mask_ratio",
        "recipe, axes, shapes, {name: -of for name, of in scores.items()}, 1.0 - round_plan.mask_ratio",
        (CHOSEN,),
    ),
    Fault(
        "prune cuts the most important groups",
        "recap_cli/rounds/pruning.py",
        "        if past is not None:\n",
        "        scores = {name: -of for name, of in scores.items()}\n        if past is not None:\n",
        (CHOSEN,),
    ),
    Fault(
        "D_s is always the first examples",
        "recap_cli/data/sampling.py",
        'torch.randperm(count, generator=generator_for(seed, round, f"sample for {stage}"))[:size]',
        "torch.arange(count)[:size]",
        (SAMPLE,),
    ),
    Fault(
        "a merge writes the change of a compensated cut into the full model",
        "recap_cli/rounds/merging.py",
        "without_change(trained, context.compensation(folder, plan), in_small)",
        "trained",
        (WRITTEN_BACK,),
    ),
    Fault(
        "padding counts in the compensation of a cut",
        "recap_cli/core/rows.py",
        "inputs = inputs[mask.bool()]",
        "pass",
        (f"{SHARED}[bert]",),
    ),
    Fault(
        "of a layer that is called many times the last call is compensated",
        "recap_cli/rounds/compensation.py",
        "sums.moments[cut.weight] += Moments",
        "sums.moments[cut.weight] = Moments",
        (f"{SHARED}[albert]",),
    ),
    Fault(
        "the next gradual step scores a model without what the one before has absorbed",
        "recap_cli/core/gradual.py",
        "        _add(model, change)\n",
        "",
        (f"{SHARED}[gpt2]",),
    ),
    Fault(
        "what a gradual step absorbs replaces what those before it have",
        "recap_cli/core/gradual.py",
        "absorbed[name] + tensor if name in absorbed else tensor",
        "tensor",
        (f"{SHARED}[gpt2]", IN_STEPS),
    ),
    Fault(
        "what a gradual step absorbs is written into the memory of the full model",
        "recap_cli/core/gradual.py",
        "param.data = torch.add(param.data, tensor.to(param.dtype))",
        "param.data.add_(tensor.to(param.dtype))",
        (IN_STEPS,),
    ),
    Fault(
        "a ridge is judged on the examples that it was fitted on",
        "recap_cli/core/compensation.py",
        "((first, second), (second, first))",
        "((first, first), (second, second))",
        (RIDGE,),
    ),
    Fault(
        "the worst round becomes the product",
        "recap_cli/rounds/merging.py",
        "_rank(metrics, metric) < _rank(before, metric)",
        "_rank(metrics, metric) > _rank(before, metric)",
        (f"{PRODUCT}[1-matthews]",),
    ),
    Fault(
        "the last round becomes the product",
        "recap_cli/rounds/merging.py",
        'return\n    place = f"best-',
        'pass\n    place = f"best-',
        (f"{PRODUCT}[1-matthews]",),
    ),
    Fault(
        "a round of the ramp may be the product",
        "recap_cli/rounds/merging.py",
        "if not context.round_plans[transaction.round - 1].product:",
        "if not context.round_plans:",
        (RAMP,),
    ),
    Fault(
        "eq. (1) without the square",
        "plugins/criteria/taylor.py",
        "(weight * grad).square()",
        "(weight * grad).abs()",
        (f"{NAIVE}[1-vit]",),
    ),
    Fault(
        "eq. (4) with the weight",
        "plugins/criteria/fisher.py",
        "return grad.square()",
        "return (grad * weight).square()",
        (f"{NAIVE}[4-vit]",),
    ),
    Fault(
        "importance is the sum over batches, not the mean over D_s",
        "recap_cli/core/importance.py",
        "(loss if each else loss * share).backward()",
        "loss.backward()",
        (f"{NAIVE}[1-vit]",),
    ),
    Fault(
        "entries are summed along the wrong axis",
        "recap_cli/core/importance.py",
        "along = along.sum(",
        "along = (along.mT if along.shape[0] == along.shape[-1] else along).sum(",
        (f"{NAIVE}[1-vit]",),
    ),
    Fault(
        "the ranking is by importance, not by importance per parameter",
        "recap_cli/core/ranking.py",
        'by_parameter = limits.scope == "global" or (',
        "by_parameter = False and (",
        ("tests/core/test_ranking.py::test_global_ranks_by_importance_per_parameter",),
    ),
    Fault(
        "a group is dropped only where all of it fits into the budget",
        "recap_cli/core/ranking.py",
        "if dropped + params[i] / 2 > goal",
        "if dropped + params[i] > goal",
        ("tests/core/test_ranking.py::test_the_gradual_schedule_counts_from_the_original_sizes[3-0.333-2]",),
    ),
    Fault(
        "the floor is ignored",
        "recap_cli/core/ranking.py",
        "spare = [axis.size - limits.lowest(axis, original) for axis in pool]",
        "spare = [axis.size - limits.least for axis in pool]",
        ("tests/core/test_ranking.py::test_the_floor_holds_in_every_axis",),
    ),
    Fault(
        "each gradual step cuts a share of what is left as if it were the whole",
        "recap_cli/core/gradual.py",
        "(1.0 - ratio) ** (step / steps)",
        "(1.0 - ratio) ** (1 / steps)",
        (CHOSEN,),
    ),
    Fault(
        "the scope of pruning is ignored",
        "recap_cli/rounds/selection.py",
        "scope=recipe.prune.scope",
        'scope="per-kind"',
        (GLOBAL,),
    ),
    Fault(
        "the mask is chosen in the scope of pruning",
        "recap_cli/rounds/masking.py",
        "Limits(scope=recipe.mask.scope,",
        "Limits(scope=recipe.prune.scope,",
        (CHOSEN,),
    ),
    Fault(
        "pruning goes by the mask's criterion",
        "recap_cli/rounds/pruning.py",
        "axes, recipe.prune.criterion, sample",
        "axes, recipe.mask.criterion, sample",
        (CHOSEN,),
    ),
    Fault(
        "the mask's share is of the full model",
        "recap_cli/rounds/masking.py",
        "shapes, scores, 1.0 - round_plan.mask_ratio,",
        "shapes, scores, (1.0 - round_plan.mask_ratio) / (1.0 - round_plan.prune_ratio),",
        (CHOSEN,),
    ),
    Fault(
        "later rounds keep the first plan",
        "recap_cli/rounds/pruning.py",
        "_PLANS[round_plan.plan](",
        '_PLANS["same" if number > 1 else round_plan.plan](',
        (PLAN,),
    ),
    Fault(
        "dropout is on while importance is measured",
        "recap_cli/stages/prune.py",
        "model = context.model(tensors)\n",
        "model = context.model(tensors).train()\n",
        (DROPOUT,),
    ),
    Fault(
        "seeds do not depend on the round",
        "recap_cli/data/sampling.py",
        'f"{seed}/{round}/{stage}"',
        'f"{seed}/{stage}"',
        (SEEDS,),
    ),
    Fault(
        "every epoch of the warm-up has the same order",
        "recap_cli/rounds/warm_up.py",
        "round=0, epoch=epoch)",
        "round=0, epoch=0)",
        (WARM_UP,),
    ),
    Fault(
        "every round begins its epochs anew",
        "recap_cli/rounds/training_round.py",
        "_epochs(recipe, split, before, steps, device)",
        "_epochs(recipe, split, 0, steps, device)",
        (ORDER,),
    ),
    Fault(
        "the learning rate begins anew in each round",
        "recap_cli/rounds/training_round.py",
        "learning_rate(first + step,",
        "learning_rate(step,",
        (TRAINED,),
    ),
    Fault(
        "the head's learning rate is that of everything",
        "recap_cli/rounds/trainer.py",
        "for name in scale.keys() & set(context.layout.head)}",
        "for name in scale}",
        (ADAMW,),
    ),
    Fault(
        "finetuning is judged on the training examples",
        "recap_cli/rounds/training_round.py",
        "validation, context.objective, how",
        "context.splits(track)[0], context.objective, how",
        (ADAMW,),
    ),
    Fault(
        "embeddings move by default",
        "recap_cli/rounds/small_model.py",
        "return name in layout.embeddings and not (",
        "return name in layout.embeddings and bool(",
        (ADAMW,),
    ),
    Fault(
        "gradients are clipped after the step",
        "recap_cli/training/loop.py",
        "_clip(optimizer.trainables, steps.max_grad_norm)\n                optimizer.step()\n",
        "optimizer.step()\n                _clip(optimizer.trainables, steps.max_grad_norm)\n",
        (SGD,),
    ),
    Fault(
        "a last, shorter micro-batch counts as much as a whole one",
        "recap_cli/training/loop.py",
        "share = count / (max(",
        "share = min(size, counted) / (max(",
        (SGD,),
    ),
    Fault(
        "a micro-batch weighs by its examples, whatever the task counts",
        "recap_cli/training/loop.py",
        "(mean * share).backward()",
        '(mean * len(part["labels"]) / examples).backward()',
        (WORDS,),
    ),
    Fault(
        "a batch of D_s weighs by its examples, whatever the task counts",
        "recap_cli/rounds/importance.py",
        "yield mean, float(count) / max(whole, 1.0)",
        'yield mean, len(batch["labels"]) / len(sample.indices)',
        (SHARES,),
    ),
    Fault(
        "an evaluation is the mean over its batches",
        "recap_cli/training/evaluation.py",
        "total + float(mean) * float(count), counted + float(count)",
        "total + float(mean), counted + 1.0",
        (EVALUATED,),
    ),
    Fault(
        "biases and norms decay too",
        "recap_cli/trainable/optim.py",
        "self.weight_decay if trainable.grad_param.ndim > 1 else 0.0",
        "self.weight_decay if trainable.grad_param.ndim > 0 else 0.0",
        ("tests/trainable/test_optim.py::test_vectors_do_not_decay",),
    ),
    Fault(
        "the bias correction of a whole tensor is one step late",
        "recap_cli/trainable/optim.py",
        "torch._foreach_div_(denominators, (1 - beta2 ** (counts + 1)) ** 0.5)",
        "torch._foreach_div_(denominators, (1 - beta2 ** (counts + 2)) ** 0.5)",
        ("tests/trainable/test_optim.py::test_ten_steps_are_torchs_own_to_the_bit[adamw]",),
    ),
    Fault(
        "all entries are as old as the oldest",
        "recap_cli/trainable/optim.py",
        "t = torch.cat([count.flatten() for count in counts]).add(1).double()",
        "t = torch.cat([count.flatten() for count in counts]).add(1).double().fill_(8.0)",
        ("tests/trainable/test_optim.py::test_entries_of_different_ages_each_match_an_optimizer_of_their_own_age",),
    ),
    Fault(
        "moments that sit out do not age",
        "recap_cli/trainable/moments.py",
        "aged = {COUNT: 1, **idle_decay}",
        "aged = {COUNT: 1, **dict.fromkeys(idle_decay, 1.0)}",
        ("tests/trainable/test_moments.py::test_a_round_writes_back_what_trained_and_ages_the_rest",),
    ),
    Fault(
        "moments that sit out age twice",
        "recap_cli/trainable/moments.py",
        'tensor * aged[key.rpartition("/")[2]]',
        'tensor * aged[key.rpartition("/")[2]] ** 2',
        ("tests/trainable/test_moments.py::test_a_round_writes_back_what_trained_and_ages_the_rest",),
    ),
    Fault(
        "the mask's entries are written to the small model's places in the full one",
        "recap_cli/core/surgery.py",
        "chosen if kept is None else kept[chosen]",
        "chosen",
        (ADAMW,),
    ),
    Fault(
        "cuts of every width share the units of the mask",
        "recap_cli/core/axes.py",
        '("" if cut.width == default_width else f"{cut.width}-wide")',
        '""',
        ("tests/core/test_axes.py::test_cuts_of_another_width_or_word_have_units_of_their_own",),
    ),
    Fault(
        "what is trained or frozen whole has units of the mask too",
        "recap_cli/core/axes.py",
        "[cut for cut in axis.cuts if cut.param not in whole]",
        "list(axis.cuts)",
        ("tests/core/test_axes.py::test_what_is_whole_has_no_units",),
    ),
    Fault(
        "what a prune step removed does not move later offsets up",
        "recap_cli/core/axes.py",
        "offset=cut.offset - before",
        "offset=cut.offset",
        ("tests/core/test_axes.py::test_shrinking_a_fused_matrix_trains_the_sections_up",),
    ),
    Fault(
        "labels and teacher swap their weights",
        "recap_cli/tasks/losses.py",
        "(1 - lesson.weight) * mean + lesson.weight * soft",
        "lesson.weight * mean + (1 - lesson.weight) * soft",
        ("tests/training/test_distillation.py::test_a_step_learns_from_labels_and_teacher_in_micro_batches_too[1-words]",),
    ),
    Fault(
        "the teacher's outputs for an image as it is stand beside the flipped one",
        "recap_cli/data/split.py",
        "self.soft.at(indices, variants)",
        "self.soft.at(indices, None)",
        ("tests/data/test_soft_targets.py::test_a_batch_has_the_targets_of_the_variants_that_were_drawn_for_it",),
    ),
    Fault(
        "the loss of a teacher gets smaller with its temperature",
        "recap_cli/tasks/losses.py",
        "temperature**2 * F.kl_div",
        "F.kl_div",
        ("tests/training/test_distillation.py::test_soft_cross_entropy_is_the_divergence_of_the_softened_classes[5.0]",),
    ),
    Fault(
        "padding counts in the mean of hidden states",
        "recap_cli/core/hidden_states.py",
        "    if mask is not None:\n        return",
        "    if mask is not None and False:\n        return",
        (HIDDEN,),
    ),
    Fault(
        "the distance of hidden states has no weight",
        "recap_cli/tasks/losses.py",
        "lesson.hidden_weight * _mean_distance(",
        "_mean_distance(",
        (HIDDEN_ROWS,),
    ),
    Fault(
        "the students of a run's own teacher learn from the model before it was taught",
        "recap_cli/rounds/merging.py",
        "context.full_tensors() | weights",
        "context.full_tensors()",
        (OWN_TEACHER,),
    ),
    Fault(
        "a teacher's learning rate is the student's",
        "recap_cli/rounds/rates.py",
        "given = recipe.distill.teacher_lr if is_teacher else recipe.finetune.lr",
        "given = recipe.finetune.lr",
        ("tests/rounds/test_rates.py::test_auto_is_the_rate_of_the_method_and_less_for_a_wide_model",),
    ),
    Fault(
        "wanda counts weights, whatever they read",
        "plugins/criteria/wanda.py",
        "entries = weight * norms.to(weight.device)",
        "entries = weight",
        (WANDA,),
    ),
    Fault(
        "patience is one round longer",
        "recap_cli/rounds/status.py",
        ">= recipe.patience",
        "> recipe.patience",
        (PATIENCE,),
    ),
    Fault(
        "the ramp goes down",
        "plugins/methods/recap.py",
        "(1 - settings.ramp) * progress)",
        "(1 - settings.ramp) * (1 - progress))",
        (RISES,),
    ),
    Fault(
        "training moves the statistics of batch norms",
        "recap_cli/core/batch_norms.py",
        "            module.eval()",
        "            module.train(on)",
        ("tests/core/test_batch_norms.py::test_training_leaves_running_statistics_alone_and_all_else_trains",),
    ),
    Fault(
        "label maps are those of other images",
        "recap_cli/data/map_split.py",
        "        examples = encoded.select(indices.tolist())[:]",
        "        examples = encoded.select(sorted(indices.tolist()))[:]",
        ("tests/data/test_map_split.py::test_maps_in_memory_are_those_that_each_batch_decodes[0-none]",),
    ),
    Fault(
        "the union counts what is right twice",
        "plugins/tasks/semantic_segmentation.py",
        "union = true + predicted - right",
        "union = true + predicted",
        ("tests/tasks/test_semantic_segmentation.py::test_miou_is_that_of_torchmetrics_where_classes_occur",),
    ),
    Fault(
        "a norm's backward reads its output as if it had no bias",
        "recap_cli/trainable/norms.py",
        "x = out.clone() if bias is None else out - bias",
        "x = out.clone()",
        (f"{ONCE}test_a_norm_has_the_gradients_of_torchs[True-True]",),
    ),
    Fault(
        "columns are made again of another activation function",
        "recap_cli/trainable/activations.py",
        "Origin(args[0].detach(), module.forward, out._version)",
        "Origin(args[0].detach(), torch.relu, out._version)",
        (f"{ONCE}test_the_trainable_columns_are_made_again_of_what_is_kept_anyway[GELU-None-False-scattered]",),
    ),
    Fault(
        "what was written to in between counts as what it was",
        "recap_cli/trainable/activations.py",
        "if isinstance(found, Origin) and found.version == x._version",
        "if isinstance(found, Origin)",
        (f"{ONCE}test_the_trainable_columns_are_made_again_of_what_is_kept_anyway[LeakyReLU-added_in_place-True-scattered]",),
    ),
    Fault(
        "a round of the ramp takes its batches whole",
        "plugins/methods/recap.py",
        "ceil((1 - prune_ratio) / (1 - settings.prune_ratio) - 1e-9)",
        "ceil((1 - settings.prune_ratio) / (1 - prune_ratio) - 1e-9)",
        (RISES,),
    ),
)
TOGETHER = FAULTS[:3]

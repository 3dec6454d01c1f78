"""The exercises: which functions a student writes, which tests grade them, what a hand-out blanks besides.

check.py, swap.py and make.py all read this table, and nothing else says what an exercise is.
"""

from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 60  # of CPU that one exercise, or one planted bug, may take


class Exercise(NamedTuple):
    """One exercise. A function is named "module:name" or "module:Class.name"."""

    number: int
    name: str  # the student writes exercises/NAME.py
    functions: tuple  # that the student's file has to define, by the last part of their names
    tests: tuple  # pytest node ids, the quick and telling ones first: the first failure is reported
    blanked: tuple = ()  # functions that a hand-out blanks too, since they give the solution away
    needs: str | None = None  # a package that does not exist for every system


def nodes(file, *tests):
    return tuple(f"tests/{file}::test_{test}" for test in tests)


EXERCISES = {
    exercise.name: exercise
    for exercise in (
        Exercise(
            1,
            "vote",
            ("ttrl:vote",),
            nodes(
                "test_algorithm.py",
                "vote",
                "vote_over_answers_whose_equality_is_not_transitive",
                "vote_counts_choices_by_letter",
                "vote_gives_the_classes_in_the_order_of_their_first_members",
            ),
        ),
        Exercise(
            2,
            "advantages",
            ("ttrl:advantages",),
            nodes("test_algorithm.py", "advantages_by_hand", "unanimous_group_has_no_advantage"),
        ),
        Exercise(
            3,
            "loss",
            ("ttrl:grpo_loss",),
            nodes(
                "test_algorithm.py",
                "clipped_surrogate_by_hand",
                "loss_is_a_sum_over_tokens_by_the_global_count",
                "masked_tokens_have_no_gradient_even_if_not_finite",
                "k3_kl_by_hand",
                "k3_kl_is_clamped",
                "the_kl_of_policies_that_are_close_keeps_its_digits",
                "a_token_that_became_all_but_impossible_has_a_finite_gradient",
                "the_gradient_of_the_loss_equals_finite_differences",
            ),
        ),
        Exercise(
            4,
            "attention",
            (
                "rollout:KVCache.open_step",
                "rollout:KVCache.attend_cached",
                "kernels.packing:AttentionGroup.mask",
            ),
            (
                *nodes(
                    "test_packing.py",
                    "cached_attention_equals_each_row_alone",
                    "packed_attention_equals_each_row_alone",
                ),
                *nodes(
                    "test_model.py",
                    "decode_of_a_row_does_not_depend_on_the_batch",
                    "cached_decode_equals_transformers",
                ),
            ),
        ),
        Exercise(
            5,
            "sampling",
            ("kernels.sampler:uniform", "kernels.sampler:inverse_cdf", "kernels.sampler:sample_inverse_cdf"),
            nodes(
                "test_rollout.py",
                "a_uniform_number_is_a_function_of_key_and_position",
                "uniform_numbers_are_uniform_and_unrelated",
                "inverse_cdf_by_hand",
                "tokens_come_with_their_probability",
                "a_token_that_cannot_be_is_never_drawn",
            ),
            blanked=tuple(
                f"kernels.sampler_triton:{name}"
                for name in """block_mass block_draw block_above raise_floor load_masses load_block number_of
                    first_above uniform_of""".split()
            ),
        ),
        Exercise(
            6,
            "logprob",
            ("kernels.logprob:partials", "kernels.logprob:merge", "kernels.logprob:logits_to_gradient"),
            nodes(
                "test_logprob.py",
                "values_and_gradients",
                "one_output_alone_has_the_same_gradient",
                "frozen_inputs_and_no_tokens",
                "far_logits_stay_finite",
                "low_precision_is_no_worse_than_the_plain_formula",
                "autocast_reaches_the_hidden_states_and_nothing_else",
                "only_a_tile_of_the_logits_exists_and_one_gradient_beside_the_sum",
            ),
            blanked=("kernels.logprob_triton:logits_to_gradient_kernel",),
        ),
        Exercise(
            7,
            "kernel",
            ("kernels.logprob_triton:partials_kernel",),
            nodes("kernels_interpreted.py", "partial_results_by_the_plain_formula"),
            needs="triton",
        ),
        Exercise(
            8,
            "lucky",
            ("report.metrics:reward_accuracy",),
            nodes("test_algorithm.py", "reward_accuracy_by_hand"),
        ),
    )
}

# The ninth exercise is a file of tests, graded by how many of the planted bugs make one of them fail.
TESTS, MUTANTS = "test_student.py", "exercises/mutants"

# What a hand-out leaves out: solutions, wrong ones, and planted bugs, whose diffs quote the right lines.
LEFT_OUT = (MUTANTS, "tests/wrong_solutions.py", "tests/mutant_killers.py", "tests/test_exercises.py")


def student_file(exercise, folder):
    return Path(folder) / f"{exercise.name}.py"


def short_name(function):
    """The name that the student's file gives a function: "rollout:KVCache.open_step" -> "open_step"."""
    return function.split(":")[1].split(".")[-1]


def source_file(function):
    """The file that a function stands in: "kernels.sampler:uniform" -> kernels/sampler.py."""
    return function.split(":")[0].replace(".", "/") + ".py"

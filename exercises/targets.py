"""The exercises: the functions that a student writes, and the tests that check them.

check.py, swap.py and make.py all read this table.
"""

from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Exercise(NamedTuple):
    """One exercise. A function is named "module:name" or "module:Class.name"; lists are words."""

    name: str  # the student writes exercises/NAME.py
    written: str  # the functions that the student's file defines, by the last part of their names
    checks: str  # "file::test", the quick and telling tests first: the first failure is reported
    given_away: str = ""  # other functions that contain the solution: a hand-out blanks them too
    needs: str | None = None  # a package that does not exist for every system

    @property
    def number(self):
        return list(EXERCISES).index(self.name) + 1

    @property
    def functions(self):
        return self.written.split()

    @property
    def blanked(self):
        return self.functions + self.given_away.split()

    @property
    def tests(self):
        return [f"tests/{check}".replace("::", ".py::test_") for check in self.checks.split()]


LIST = (
    Exercise("vote", "ttrl:vote", """
        test_algorithm::vote
        test_algorithm::vote_over_answers_whose_equality_is_not_transitive
        test_algorithm::vote_counts_choices_by_letter
        test_algorithm::vote_gives_the_classes_in_the_order_of_their_first_members"""),
    Exercise("advantages", "ttrl:advantages", """
        test_algorithm::advantages_by_hand
        test_algorithm::unanimous_group_has_no_advantage"""),
    Exercise("loss", "ttrl:grpo_loss", """
        test_algorithm::clipped_surrogate_by_hand
        test_algorithm::loss_is_a_sum_over_tokens_by_the_global_count
        test_algorithm::masked_tokens_have_no_gradient_even_if_not_finite
        test_algorithm::k3_kl_by_hand
        test_algorithm::k3_kl_is_clamped
        test_algorithm::the_kl_of_policies_that_are_close_keeps_its_digits
        test_algorithm::a_token_that_became_all_but_impossible_has_a_finite_gradient
        test_algorithm::the_gradient_of_the_loss_equals_finite_differences"""),
    Exercise("attention", """
        kernels.kv_cache:KVCache.open_step
        kernels.kv_cache:KVCache.attend_cached
        kernels.packing:AttentionGroup.mask""", """
        test_packing::cached_attention_equals_each_row_alone
        test_packing::packed_attention_equals_each_row_alone
        test_model::decode_of_a_row_does_not_depend_on_the_batch
        test_model::cached_decode_equals_transformers"""),
    Exercise("sampling", """
        kernels.sampler:uniform
        kernels.sampler:inverse_cdf
        kernels.sampler:sample_inverse_cdf""", """
        test_rollout::a_uniform_number_is_a_function_of_key_and_position
        test_rollout::uniform_numbers_are_uniform_and_unrelated
        test_rollout::inverse_cdf_by_hand
        test_rollout::tokens_come_with_their_probability
        test_rollout::a_token_that_cannot_be_is_never_drawn""",
        given_away="""
        kernels.sampler_triton:block_mass
        kernels.sampler_triton:block_draw
        kernels.sampler_triton:block_above
        kernels.sampler_triton:raise_floor
        kernels.sampler_triton:load_masses
        kernels.sampler_triton:load_block
        kernels.sampler_triton:number_of
        kernels.sampler_triton:first_above
        kernels.sampler_triton:uniform_of"""),
    Exercise("logprob", """
        kernels.logprob:partials
        kernels.logprob:merge
        kernels.logprob:logits_to_gradient""", """
        test_logprob::values_and_gradients
        test_logprob::frozen_inputs_and_no_tokens
        test_logprob::far_logits_stay_finite
        test_logprob::autocast_reaches_the_hidden_states_and_nothing_else
        test_logprob::only_a_tile_of_the_logits_exists_and_one_gradient_beside_the_sum""",
        given_away="kernels.logprob_triton:logits_to_gradient_kernel"),
    Exercise("kernel", "kernels.logprob_triton:partials_kernel",
        "kernels_interpreted::partial_results_by_the_plain_formula", needs="triton"),
    Exercise("lucky", "report.metrics:reward_accuracy", "test_algorithm::reward_accuracy_by_hand"),
)  # fmt: skip
EXERCISES = {exercise.name: exercise for exercise in LIST}

# The ninth exercise is a file of tests, graded by how many of the planted bugs make one of them fail.
TESTS, MUTANTS = "test_student.py", "exercises/mutants.json"

# What a hand-out leaves out: solutions, wrong ones, and planted bugs, which quote the right lines.
LEFT_OUT = (MUTANTS, "tests/wrong_solutions.py", "tests/mutant_killers.py", "tests/test_exercises.py")


def student_file(exercise, folder):
    return Path(folder) / f"{exercise.name}.py"


def short_name(function):
    """The name that the student's file gives a function: "kernels.packing:AttentionGroup.mask" -> "mask"."""
    return function.replace(":", ".").split(".")[-1]


def source_file(function):
    """The file that defines a function: "kernels.sampler:uniform" -> "kernels/sampler.py"."""
    return function.split(":")[0].replace(".", "/") + ".py"

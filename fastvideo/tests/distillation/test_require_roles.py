"""One message lists every missing, unknown and wrongly trained role."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastvideo.distillation.bundle import ModelBundle, RoleHandle, check_roles
from fastvideo.distillation.types import UserError
from fastvideo.tests.distillation.toys import SpyAdapter, gaussian

NEEDED, TRAINED = ("student", "teacher", "critic"), ("student", "critic")
ANY_ROLES = st.dictionaries(st.sampled_from((*NEEDED, "discriminator", "studnet")), st.booleans())


def message_for(given_roles: dict[str, bool]) -> str:
    """What the check says; empty when it accepts."""
    try:
        check_roles(given_roles, NEEDED, TRAINED)
    except UserError as error:
        return str(error)
    return ""


@given(ANY_ROLES)
def test_the_message_names_exactly_the_wrong_roles(given_roles: dict[str, bool]) -> None:
    message = message_for(given_roles)
    for role in {*NEEDED, *given_roles}:
        assert (f"role '{role}' is missing" in message) == (role not in given_roles)
        assert (f"role '{role}' is unknown" in message) == (role not in NEEDED)
        wrong = role in NEEDED and given_roles.get(role, role in TRAINED) != (role in TRAINED)
        assert (f"role '{role}' must be" in message) == wrong


@given(ANY_ROLES)
def test_only_the_exact_roles_are_accepted(given_roles: dict[str, bool]) -> None:
    assert (message_for(given_roles) == "") == (given_roles == {"student": True, "teacher": False, "critic": True})


def test_the_message_says_what_was_needed_and_what_was_given() -> None:
    message = message_for({"student": False, "teacher": True, "discriminator": True})
    assert message == (
        "roles: role 'critic' is missing; role 'discriminator' is unknown to this method; "
        "role 'student' must be trained, but is frozen; role 'teacher' must be frozen, but is trainable. "
        "Needed: student, teacher, critic; given: student, teacher, discriminator"
    )
    assert message_for({}).endswith("given: none")


def test_without_trainable_only_the_names_are_checked() -> None:
    check_roles({"student": False, "teacher": True}, ["teacher", "student"])


def test_trainable_empty_means_that_all_are_frozen() -> None:
    with pytest.raises(UserError, match="role 'student' must be frozen"):
        check_roles({"student": True}, ["student"], [])


def test_a_bundle_checks_its_handles(bundle: ModelBundle) -> None:
    bundle.require_roles(NEEDED, trainable=TRAINED)
    with pytest.raises(UserError, match=r"role 'old' is missing.*role 'critic' is unknown"):
        bundle.require_roles(["student", "teacher", "old"])


def test_a_handle_freezes_and_unfreezes_its_network(adapter: SpyAdapter) -> None:
    network = gaussian(adapter, "denoiser")
    assert RoleHandle("teacher", adapter, network).parameters() == []
    assert not network.mean.requires_grad
    handle = RoleHandle("student", adapter, network, trainable=True)
    assert {id(p) for p in handle.parameters()} == {id(network.mean), id(network.log_std)}


def test_a_bundle_knows_its_roles_in_order(bundle: ModelBundle) -> None:
    assert bundle.roles == NEEDED
    assert [handle.name for handle in bundle] == list(NEEDED)
    assert "critic" in bundle
    assert "discriminator" not in bundle


def test_an_optional_role_may_be_left_out_and_must_be_frozen() -> None:
    check_roles({"student": True}, ["student"], ["student"], optional=["teacher"])
    check_roles({"student": True, "teacher": False}, ["student"], ["student"], optional=["teacher"])
    with pytest.raises(UserError, match=r"role 'teacher' must be frozen.*Needed: student, teacher \(optional\)"):
        check_roles({"student": True, "teacher": True}, ["student"], ["student"], optional=["teacher"])

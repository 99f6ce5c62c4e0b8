"""Contracts and tests name each other: no claim without an attack, no attack without a claim."""

from __future__ import annotations

from collections import Counter

from lora.contracts import all_contracts
from tests.meta.collected import attempts, parameter_ids

CLAIMS = [(contract.contract, claim) for contract in all_contracts() for claim in contract.claims]
IDS = {claim.id for _, claim in CLAIMS}


def test_every_claim_is_attacked() -> None:
    attacked = {attempt.claim for attempt in attempts() if not attempt.campaign}
    assert not IDS - attacked, "claims that no test of an ordinary run tries to falsify"


def test_every_attack_has_a_claim() -> None:
    stray = {f"{attempt.test}: {attempt.claim}" for attempt in attempts() if attempt.claim not in IDS}
    assert not stray


def test_ids_are_used_once() -> None:
    assert [
        identity for identity, times in Counter(claim.id for _, claim in CLAIMS).items() if times > 1
    ] == []


def test_every_claim_kills_a_bug() -> None:
    harmless = [f"{contract}: {claim.id}" for contract, claim in CLAIMS if not claim.kills]
    assert not harmless, "a claim that no planted bug breaks may be one that no test can break"


def test_every_bug_is_planted() -> None:
    expected = {f"{claim.id}-{bug}" for _, claim in CLAIMS for bug in claim.kills}
    assert not expected - parameter_ids(), "bugs that a contract lists and no test plants"

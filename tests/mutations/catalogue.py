"""The mistakes. Plain data: which text of which file, what instead, who must notice.

``old`` is short and stands once in its file. ``tests`` are what must turn red; the
model machine is tried on each as well.
"""

from __future__ import annotations

from typing import NamedTuple


class Mutation(NamedTuple):
    """One mistake."""

    name: str
    """What a command calls it."""
    file: str
    """Below ``src/pkcs11_pool``."""
    old: str
    """Text of the file, there exactly once."""
    new: str
    """What stands there instead."""
    breaks: str
    """Which promise."""
    tests: tuple[str, ...]
    """Tests of which one at least must fail; none: the model machine must notice."""


CATALOGUE = (
    Mutation(
        "no-drain",
        "engine/token_engine.py",
        "return not staff.busy and not (leases",
        "return not (leases",
        "A logout and the SO wait until no call is inside the module.",
        ("test_login.py::test_logout_waits_for_the_call_inside_or_changes_nothing",),
    ),
    Mutation(
        "no-epoch-check",
        "cryptoki/keys.py",
        "            and entry.epoch == session.epoch\n",
        "",
        "A number is never used in another login than its own.",
        ("test_keys.py::test_a_number_is_never_used_in_another_login_than_its_own",),
    ),
    Mutation(
        "no-generation-check",
        "cryptoki/keys.py",
        "            and entry.generation == session.generation\n",
        "",
        "A number is never used in another generation of the module than its own.",
        (
            (
                "test_keys_trust.py::"
                "test_a_number_is_never_used_in_another_generation_than_its_own"
            ),
        ),
    ),
    Mutation(
        "no-late-look",
        "engine/held.py",
        "            self._look_later(now)\n",
        "",
        "A result that is held back waits for no call that hangs.",
        (
            "test_dispatch.py::test_a_result_does_not_wait_for_tidying_that_hangs",
            (
                "test_call_budget.py::"
                "test_a_result_that_is_held_back_waits_for_no_hang_either"
            ),
        ),
    ),
    Mutation(
        "no-age",
        "cryptoki/keys.py",
        "        age = self._max_age\n",
        "        age = None\n",
        "A number that is older than handle_max_age is verified.",
        (
            (
                "test_keys_trust.py::"
                "test_a_number_is_verified_once_when_it_is_older_than_the_age"
            ),
            (
                "test_keys_trust.py::"
                "test_a_number_that_others_gave_away_is_not_used_beyond_its_age"
            ),
        ),
    ),
    Mutation(
        "no-new-generation",
        "cryptoki/module.py",
        "        session.forget()\n    module.live.clear()",
        "        pass\n    module.live.clear()",
        "A session of an older generation never reaches the module again.",
        (
            "test_module.py::test_nothing_of_an_older_generation_enters_the_module",
            "test_module.py::test_a_session_that_was_open_at_the_end_of_its_generation",
        ),
    ),
    Mutation(
        "close-twice",
        "engine/workers.py",
        "        # Behind the caller's back.\n",
        "        session.functions.C_CloseSession(session.handle)\n",
        "Nothing is closed twice.",
        ("test_engine.py::test_each_session_that_is_opened_is_closed_once",),
    ),
    Mutation(
        "hand-over-twice",
        "engine/work.py",
        "            session = room.ahead.popleft()\n",
        "            session = room.ahead[0]\n",
        "A session is handed to one operation.",
        ("test_engine.py::test_no_session_serves_two_operations",),
    ),
    Mutation(
        "keep-used-session",
        "engine/workers.py",
        "        session.close()\n"
        "        return self._open_ahead() if opens and not self.lost else None",
        "        if opens and not self.lost:\n            return session\n"
        "        session.close()\n"
        "        return self._open_ahead() if opens and not self.lost else None",
        "Every one-shot operation has a fresh session.",
        ("test_engine.py::test_no_session_serves_two_operations",),
    ),
    Mutation(
        "forget-cancelled",
        "engine/dispatch.py",
        "                job.phase = Phase.SETTLED\n"
        "                self._take_out_locked(job)\n",
        "                job.phase = Phase.SETTLED\n",
        "A caller who is cancelled while waiting is out of the line.",
        ("test_engine_cancellation.py::test_cancelled_while_waiting_nothing_happened",),
    ),
    Mutation(
        "lose-wake-up",
        "engine/dispatch.py",
        "                    staff.wake_one(now)\n            else:",
        "                    pass\n            else:",
        "Who finds a free session and an idle worker is served at once.",
        ("test_engine.py::test_a_signature_costs_four_calls",),
    ),
    Mutation(
        "wait-behind",
        "engine/workers.py",
        "        opens = not again and engine.deliver(",
        "        session.close()\n        opens = not again and engine.deliver(",
        "No result waits for what a worker does behind its caller's back.",
        ("test_call_budget.py::test_a_result_does_not_wait_for_a_hang_behind_it",),
    ),
    Mutation(
        "hang-behind-for-ever",
        "engine/overdue.py",
        "        if behind and not self._module.turn.serialized:",
        "        if False:",
        "A hang behind a caller is given up on when somebody waits for its session.",
        (
            (
                "test_engine_deadlines.py::"
                "test_a_hang_behind_a_caller_is_given_up_on_by_who_waits_for_it"
            ),
        ),
    ),
    Mutation(
        "no-trust-mark",
        "cryptoki/keys.py",
        # Not the mark alone: what is left of it is made up for after the call.
        "        if seen != entry.identity:",
        "        if not seen:",
        "A number is verified after objects may have changed.",
        (
            (
                "test_keys_reuse.py::"
                "test_no_signature_is_made_with_another_key_than_the_one_it_names"
            ),
            (
                "test_keys_reuse.py::"
                "test_an_old_number_signs_for_nobody_when_it_is_another_keys"
            ),
        ),
    ),
    Mutation(
        "leak-lease",
        "engine/leasing.py",
        "            self.end_lease(result.lease, NOBODY)",
        "            pass",
        "A lease for a caller who was just cancelled goes back whole, at once.",
        (
            (
                "test_leases_lost.py::"
                "test_a_lease_for_a_caller_just_cancelled_is_given_back"
            ),
            "test_leases_lost.py::test_a_lease_cancelled_while_it_is_opened_is_closed",
        ),
    ),
    Mutation(
        "pin-twice",
        "login/pin_guard.py",
        "            self._refused[who] |= {pin.fingerprint()}",
        "            pass",
        "A rejected PIN is not sent again.",
        ("test_login.py::test_a_rejected_pin_is_not_sent_again",),
    ),
    Mutation(
        "pin-to-a-stranger",
        "login/standing.py",
        "if fresh.identity != known.identity:",
        "if fresh.identity == ():",
        "To another token no PIN is sent.",
        ("test_login.py::test_another_token_is_sent_no_pin",),
    ),
    Mutation(
        "owner-goes-on",
        "cryptoki/session_objects.py",
        "            self.closed = True",
        "            pass",
        "A session object is of no use after its owner.",
        (
            (
                "test_session_objects.py::"
                "test_after_its_owner_a_session_object_is_refused_here"
            ),
        ),
    ),
    Mutation(
        "private-goes-on",
        "cryptoki/session_objects.py",
        "if self.entry.private and epoch != self.entry.epoch:",
        "if epoch < self.entry.epoch:",
        "A private session object ends with its login.",
        ("test_session_objects.py::test_a_private_session_object_ends_with_its_login",),
    ),
    Mutation(
        "guessed-state",
        "cryptoki/session.py",
        "state=SessionState(raw.state)",
        "state=SessionState(1 + 2 * self.rw)",
        "The state of a session is told by the token.",
        ("test_states.py::test_each_state_is_reached_and_told_by_the_token",),
    ),
    Mutation(
        "so-beside-ro",
        "login/attachment.py",
        "            code = old.close()\n",
        "            code = 0 if rw else old.close()\n",
        "No R/O session is open when the SO logs in.",
        ("test_security_officer.py::test_inside_the_officer_is_logged_in",),
    ),
    Mutation(
        "dead-unseen",
        "login/attachment.py",
        "            surely(old.info)\n",
        "",
        "The officer's session takes the place of one that is alive.",
        (
            (
                "test_recovery_unseen.py::test_an_officer_whose_session_takes_the_place"
                "_of_a_dead_one_begins_anew"
            ),
        ),
    ),
    Mutation(
        "login-outlives",
        "login/user_login.py",
        "                attachment.log_out()",
        "                pass",
        "Nobody is in whom the pool does not know, after an outage.",
        (
            (
                "test_login_doubt.py::test_a_session_that_closes_late_keeps_no_login"
                "_that_nobody_knows_of"
            ),
        ),
    ),
    Mutation(
        "officer-deadlock",
        "engine/rules.py",
        "self._mode.pause is Pause.NEW\n            and job.holder is not None",
        "self._mode.pause is Pause.NOT\n            and job.holder is not None",
        "Whoever holds a session comes to his end while the SO waits for it.",
        (
            (
                "test_security_officer.py::"
                "test_who_holds_a_session_comes_to_his_end_while_the_officer_waits"
            ),
        ),
    ),
    Mutation(
        "copy-left-behind",
        "cryptoki/objects.py",
        "        _undo(session, cache, made)\n        raise\n\n\ndef make(",
        "        raise\n\n\ndef make(",
        "Who is told that the key is not found has made nothing with it.",
        (
            (
                "test_keys_reuse.py::"
                "test_what_a_destroyed_key_made_is_not_left_on_the_token"
            ),
        ),
    ),
    Mutation(
        "two-wake-ups",
        "engine/work.py",
        "        if not settled or not job.waiter.wake():",
        "        if not settled or not (job.waiter.wake() and job.waiter.wake()):",
        "Every waiter ends once.",
        (),
    ),
    Mutation(
        "ahead-survives",
        "login/attachment.py",
        "        self._gate.close_ahead()",
        "        pass",
        "A session opened ahead is closed at every change of the login.",
        (),
    ),
    Mutation(
        "gauge-drifts",
        "engine/room.py",
        "        self.open_all -= len(taken)",
        "        self.open_all -= 0",
        "Sessions open are those running, ahead and leased.",
        ("test_dispatch.py::test_sessions_ahead_that_are_given_up_do_not_count",),
    ),
    Mutation(
        "last-come-first-served",
        "engine/lines.py",
        "        self._lines[job.kind].append(job)",
        "        self._lines[job.kind].appendleft(job)",
        "First come, first served.",
        ("test_engine.py::test_first_come_first_served",),
    ),
    Mutation(
        "no-deadline",
        "engine/deadlines.py",
        "if tick * TICK <= now",
        "if tick * TICK <= now - 1000",
        "A deadline passes in time.",
        ("test_engine_deadlines.py::test_a_deadline_while_waiting_sends_nothing",),
    ),
    Mutation(
        "lend-the-last",
        "engine/room.py",
        "max(1, self.limit.total - 1)",
        "max(1, self.limit.total)",
        "Leases never take the last session, unless there is only one.",
        ("test_leases.py::test_leases_leave_one_session_for_operations",),
    ),
    Mutation(
        "kept-is-alive",
        "faces/calls.py",
        "                        session.disarm()",
        "                        pass",
        "A session kept beyond its call is harmless.",
        ("test_engine_run.py::test_what_it_returned_is_harmless_at_once",),
    ),
    Mutation(
        "change-unwatched",
        "engine/dispatch.py",
        "(job.changes and runs)",
        "(job.changes and not runs)",
        "Who changes the token waits for the outcome.",
        (
            (
                "test_engine_cancellation.py::"
                "test_a_call_that_changes_waits_for_its_outcome"
            ),
        ),
    ),
    Mutation(
        "owner-cuts-off",
        "engine/leasing.py",
        "        lease.owner.wait_unused(self.options.close_timeout)\n",
        "",
        "Calls inside with a session object finish before its owner is closed.",
        ("test_session_objects.py::test_closing_the_owner_lets_calls_inside_finish",),
    ),
    Mutation(
        "change-again",
        "engine/outage.py",
        "repeats = job.repeats or (job.restart and unsent)",
        "repeats = True",
        "What may have changed a token that was lost is not made again.",
        (
            "test_recovery.py::test_a_call_that_changes_the_token_is_not_repeated",
            "test_recovery.py::test_destroying_is_not_repeated",
        ),
    ),
    Mutation(
        "made-again",
        "engine/outage.py",
        "if once or not (job.restart",
        "if not (job.restart",
        "What was made is not made again when the login is lost just after it.",
        (
            (
                "test_recovery.py::test_what_was_made_is_not_made_again_when_the_"
                "login_is_lost_just_then"
            ),
        ),
    ),
    Mutation(
        "login-not-asked-for",
        "login/attachment.py",
        "        return who_is_in(session) is who\n",
        "        return False\n",
        "A login whose answer was lost is a login: the token is asked.",
        ("test_login_doubt.py::test_a_login_whose_answer_was_lost_is_a_login",),
    ),
    Mutation(
        "nobody-looks-who-is-in",
        "login/recovering.py",
        "            if who is not known:\n",
        "            if False:\n",
        "A login that only the token knows of does not stay.",
        (
            (
                "test_login_doubt.py::test_a_token_that_cannot_be_asked_is_logged_out_"
                "for_certain"
            ),
        ),
    ),
    Mutation(
        "pin-for-nothing",
        "login/user_login.py",
        "        if outlived:\n",
        "        if False:\n",
        "No PIN is sent where the login outlived an outage.",
        (
            (
                "test_login_doubt.py::test_no_pin_is_sent_where_the_login_outlived_the_"
                "outage"
            ),
        ),
    ),
    Mutation(
        "newcomers-wait",
        "engine/rules.py",
        "if mode.outage is not None and mode.outage.over:",
        "if mode.outage is None and mode.state is PoolState.RECOVERING:",
        "After recovery_timeout newcomers are refused at once.",
        ("test_recovery.py::test_callers_wait_no_longer_than_recovery_timeout",),
    ),
    Mutation(
        "found-a-stranger",
        "login/recovering.py",
        "if info.identity == known.identity:",
        "if info.identity:",
        "On the way back no PIN is sent to another token.",
        (
            (
                "test_recovery.py::"
                "test_another_token_in_its_place_is_named_and_gets_no_pin"
            ),
            "test_recovery.py::test_the_token_is_in_another_slot",
        ),
    ),
    Mutation(
        "login-taken-for-well",
        "login/recovering.py",
        "        self._attachment.change(LoginEvent.LOST)",
        "        pass",
        "After an outage nothing of the old login is used.",
        (
            "test_recovery.py::test_who_was_logged_out_stays_out",
            "test_recovery.py::test_an_async_pin_source_is_awaited_after_an_outage",
        ),
    ),
    Mutation(
        "throttled-change-repeated",
        "engine/outage.py",
        "        if session.lent or job.changes or not job.restart:",
        "        if session.lent:",
        "A busy token is asked again for what may happen twice, and for nothing else.",
        ("test_odd_modules.py::test_what_changes_the_token_is_not_tried_again",),
    ),
    Mutation(
        "session-not-logged-in",
        "engine/work.py",
        "        if self._login_each and (error := self.not_logged_in(session)):",
        "        if False and (error := self.not_logged_in(session)):",
        "Where each session has its own login, each is logged in before it is used.",
        ("test_odd_modules.py::test_the_pin_of_sessions_follows_set_pin",),
    ),
    Mutation(
        "one-session-stays-in",
        "login/attachment.py",
        "            self.renew_anchor(rw=self.open_anchor.rw)",
        "            pass",
        "A logout leaves no session that was logged in by itself.",
        (
            (
                "test_odd_modules.py::"
                "test_a_logout_closes_the_sessions_that_have_their_own_login"
            ),
        ),
    ),
    Mutation(
        "ignored-logout-not-kept",
        "cryptoki/keys.py",
        "        if self.guards and (",
        "        if False and (",
        "After a logout that the token ignores the pool itself keeps it.",
        (
            (
                "test_odd_modules.py::"
                "test_a_logout_that_the_token_ignores_is_kept_by_the_pool"
            ),
        ),
    ),
    Mutation(
        "idle-anchor",
        "login/keeping_alive.py",
        "                    touch(anchor)",
        "                    pass",
        "Where the token drops idle sessions, the one with the login is kept alive.",
        (
            (
                "test_odd_modules.py::"
                "test_with_the_option_sessions_that_stay_open_are_kept_alive"
            ),
        ),
    ),
    Mutation(
        "leftovers-closed-under-a-call",
        "login/recovering.py",
        "            self._gate.wait_quiet(time.monotonic() + _PATIENCE)",
        "            pass",
        "No session is closed with all others while a call is in it.",
        (
            (
                "test_recovery.py::"
                "test_what_is_closed_with_all_others_is_not_closed_under_a_call"
            ),
        ),
    ),
    Mutation(
        "leftovers-forgotten",
        "cryptoki/module.py",
        '            rv.check(code, "C_CloseAllSessions")',
        "            pass",
        "What could not be closed with all others is closed later.",
        (
            (
                "test_recovery.py::"
                "test_what_could_not_be_closed_with_all_others_is_closed_later"
            ),
        ),
    ),
    Mutation(
        "officer-beside-the-look",
        "engine/rules.py",
        "            if mode.outage is not None:",
        "            if False:",
        "The security officer waits while his session is looked at.",
        (("test_recovery.py::test_the_officer_waits_while_his_session_is_looked_at"),),
    ),
    Mutation(
        "search-not-ended-again",
        "cryptoki/session.py",
        "            if functions.C_FindObjectsFinal(handle):",
        "            if functions.C_FindObjectsFinal(handle) and False:",
        "A search that could not be ended is ended once more.",
        (
            (
                "test_recovery.py::"
                "test_a_search_that_could_not_be_ended_does_not_spoil_its_session"
            ),
        ),
    ),
    Mutation(
        "pin-for-a-refused-session",
        "engine/work.py",
        "        if fault is recovery.Fault.LOGIN and self.options.login_per_session:",
        "        if fault is recovery.Fault.LOGIN:",
        "A session that is refused costs no PIN.",
        (
            (
                "test_recovery.py::"
                "test_no_pin_is_sent_because_a_session_is_refused_with_the_login_as_reason"
            ),
        ),
    ),
    Mutation(
        "leftovers-left",
        "cryptoki/module.py",
        "        code = self.functions.C_CloseAllSessions(slot_id)",
        "        code = 0",
        "What could not be closed is closed with the pool.",
        (
            (
                "test_odd_modules.py::"
                "test_sessions_that_are_not_closed_are_closed_with_the_pool"
            ),
        ),
    ),
    Mutation(
        "left-open",
        "engine/end_of_process.py",
        "    _started.add(engine)",
        "    pass",
        "A pool that is left open is closed at the end of the process.",
        (
            (
                "test_process_end.py::"
                "test_a_pool_left_open_is_closed_at_the_end_if_nobody_is_inside"
            ),
        ),
    ),
)

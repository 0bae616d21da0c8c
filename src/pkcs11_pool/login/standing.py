"""How a pool stands with its token: which it is, where, and who is logged in.

Everybody reads it, without a lock; the login actor's thread alone writes it. So
each field is replaced whole, and never changed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pkcs11_pool.errors import PoolClosed, TokenUnavailable
from pkcs11_pool.login.pin_guard import PinGuard
from pkcs11_pool.state import Epoch, Login, LoginState

if TYPE_CHECKING:
    import pkcs11

    from pkcs11_pool.config import PoolOptions
    from pkcs11_pool.cryptoki.module import Module
    from pkcs11_pool.pins import Pin
    from pkcs11_pool.state import TokenInfo


class Standing:
    """What others may know of the pool's token.

    Attributes:
        login: The login state.
        module: Remembered after the end: lost calls come back to it.
        token: The token in its slot, for ``C_OpenSession``; None: the pool is not open.
        info: What the token told of itself last.
        guard: What may be sent to the token as a PIN.
        session_pin: The PIN of the present login, where each session is logged in by
            itself.
    """

    def __init__(self, options: PoolOptions) -> None:
        self.login = Login(LoginState.PUBLIC, LoginState.PUBLIC, Epoch(1))
        self.module: Module | None = None
        self.token: pkcs11.Token | None = None
        self.info: TokenInfo | None = None
        self.guard = PinGuard()
        self.session_pin: Pin | None = None
        self._wanted_token = options.wanted_token

    def same_token(self) -> TokenInfo:
        """What the token tells now; no PIN is ever sent to another one."""
        known = self.known
        fresh = self.attached.info(known.slot_id)
        if fresh.identity != known.identity:
            raise TokenUnavailable(
                f"another token is in the slot: {fresh}, not {known}"
            )
        return fresh

    @property
    def attached(self) -> Module:
        """The module, also after the end of the pool."""
        if self.module is None:
            raise PoolClosed("the pool is not open")
        return self.module

    @property
    def known(self) -> TokenInfo:
        """The token of the open pool, as it told last."""
        if self.info is None:
            raise PoolClosed("the pool is not open")
        return self.info

    @property
    def label(self) -> str:
        """What events call the token."""
        return self.info.label if self.info is not None else self._wanted_token

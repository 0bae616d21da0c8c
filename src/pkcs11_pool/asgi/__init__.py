"""A status app for the pools of a process: health, metrics, and a page to look at.

Plain ASGI without a dependency: mount it in any application, or serve it by itself.
"""

from pkcs11_pool.asgi.app import StatusApp
from pkcs11_pool.asgi.guards import BasicAuth

__all__ = ["BasicAuth", "StatusApp"]

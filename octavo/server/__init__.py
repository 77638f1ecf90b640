"""Server: the OpenAI-compatible HTTP API over a backend.

Owns routes, request fields and their validation, response shapes, errors, the API key, Prometheus metrics, and the
HTTP server's life from bound port to shutdown. Does not own prompts' limits, detokenizing or results (`frontend`), nor
flags (`config`, `cli`); importing it leaves torch unimported. Start reading at `app`, then `generation`.
"""

from octavo.server.app import create_app
from octavo.server.backend import Backend, ServerSettings
from octavo.server.run import bind, serve, url_of

__all__ = ["Backend", "ServerSettings", "bind", "create_app", "serve", "url_of"]

"""KV blocks as numbers: the pool of pages, sequences' block tables, the prefix cache.

Owns which page belongs to whom and what it holds. Does not own tensors (`worker`) or the order of service
(`scheduler`). Start reading at pool.py, then manager.py.
"""

from octavo.cache.manager import CacheManager, NewBlocks
from octavo.cache.pool import BlockPool

__all__ = ["BlockPool", "CacheManager", "NewBlocks"]

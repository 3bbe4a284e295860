"""How the pipeline tells what it does not refuse."""

import functools

from diffusers.utils import logging


logger = logging.get_logger(__name__)


@functools.cache
def warn_once(message: str):
    """Warns of what stays as it is from call to call."""
    logger.warning(message)

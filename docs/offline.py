"""Fail the build where a page would load anything from another server."""

import logging
import re

# A link that a reader clicks is fine; a tag that makes the browser load something is not.
_LOADS = re.compile(
    r"""<(?:script|img|iframe|source|video|audio)\b[^>]*\bsrc=["']?(?:https?:)?//[^"'\s>]*"""
    r"""|<link\b(?![^>]*rel=["']?canonical)[^>]*\bhref=["']?(?:https?:)?//[^"'\s>]*"""
    r"""|(?:@import|url\()\s*["']?(?:https?:)?//[^"'\s)]*"""
)
_LOG = logging.getLogger("mkdocs.hooks.offline")


def on_post_page(output: str, page, config) -> str:
    """Warn of every address that a browser would fetch for a page; `--strict` makes that an error.

    Args:
        output: The page as HTML.
        page: The page that `output` was made from.
        config: The configuration of the site.

    Returns:
        The page as it was.
    """
    _check(output, page.file.src_path)
    return output


def on_post_template(output: str, template_name: str, config) -> str:
    """Do the same for the pages that the theme adds, such as 404.html.

    Args:
        output: The page as HTML.
        template_name: The name of the template that `output` was made from.
        config: The configuration of the site.

    Returns:
        The page as it was.
    """
    _check(output, template_name)
    return output


def _check(html: str, name: str) -> None:
    for match in _LOADS.finditer(html):
        _LOG.warning("%s loads something from elsewhere: %s", name, match[0])

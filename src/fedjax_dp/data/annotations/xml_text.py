"""XML from strangers: without entities, without documents of other places, without a flood."""

from typing import Any
from xml.etree.ElementTree import ParseError

import defusedxml
import defusedxml.ElementTree

from fedjax_dp.data.annotations.shapes import AnnotationError


def parse_xml(data: bytes) -> Any:
    """The root element.

    Raises:
        AnnotationError: not well-formed, or it declares entities, which drawing tools never do.
    """
    try:
        root = defusedxml.ElementTree.fromstring(data, forbid_dtd=True)
    except defusedxml.DefusedXmlException as error:
        raise AnnotationError(
            f"declares entities or a document type ({type(error).__name__}), which can harm who "
            "reads it. Export it again"
        ) from error
    except (ParseError, ValueError, LookupError, RecursionError) as error:
        raise AnnotationError(f"is no well-formed XML ({error})") from error
    return root


def name_of(element: Any) -> str:
    """Name of an element without its namespace."""
    return element.tag.rpartition("}")[2] if isinstance(element.tag, str) else ""

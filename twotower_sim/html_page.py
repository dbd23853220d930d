"""Pages that stand alone: text, tables and charts in one file that loads nothing, made from templates.

A figure on a page is marked with where it stands in the JSON that the page is a view of, so that both can be compared.
"""

import json
import re
import shlex
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import yaml

from twotower_sim import __version__
from twotower_sim.charts import Chart
from twotower_sim.console import PARTS
from twotower_sim.errors import InputError
from twotower_sim.pairs_plot import load_altair
from twotower_sim.preset import ROOT
from twotower_sim.tables import heading, number

Form = str | Callable[[Any], str]
"""Of str.format, or what makes text of a value."""
EMBED = "window.vegaEmbed = vegaEmbed;"


def check_html(option: str) -> None:
    """Raises InputError where pages cannot be made."""
    try:
        import altair  # noqa: F401
        import jinja2  # noqa: F401
        import vl_convert  # noqa: F401
    except ImportError as error:
        raise InputError(f"{option} needs {error.name}: pip install 'twotower-sim[plot]'") from None


def page(template: str, data: dict[str, Any], charts: dict[str, list[Chart]], command: list[str], **more: Any) -> str:
    """HTML of a template of presets/pages. ``data``: plain JSON; the template has its figures by ``figure(*keys)``.
    ``charts``: by the part of the page that they stand in. ``command``: the words that made it."""
    import jinja2

    loader = jinja2.FileSystemLoader(ROOT / "pages")
    pages = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    numbered = [chart for part in charts.values() for chart in part]
    return pages.get_template(template).render(
        data=data,
        charts=charts,
        number_of=lambda chart: next(n for n, of in enumerate(numbered) if of is chart),
        specs=_json_in_script([chart.spec for chart in numbered]),
        vega=_vega(),
        figure=_Figures(data),
        heading=heading,
        number=number,
        parts=PARTS,
        in_yaml=lambda value: yaml.safe_dump(value, sort_keys=False, allow_unicode=True),
        command=shlex.join(command),
        version=__version__,
        **more,
    )


class _Figures:
    """Figures of the data, marked with their place."""

    def __init__(self, data: dict[str, Any]) -> None:
        self._data = data

    def __call__(self, *keys: str | int, form: Form = "", per: float = 1) -> Any:
        """The one at ``keys``, in units of ``per``; ``form``: else two decimals below 1000, and none from there on."""
        from markupsafe import Markup

        value: Any = self._data
        for key in keys:
            value = value[key]
        if value is None:
            return Markup("<span>none</span>")
        text = _told(value if per == 1 else value / per, form)
        place = {"at": json.dumps(keys), "value": json.dumps(value), "per": f"{per:g}", "text": text}
        return Markup('<data data-at="{at}" data-per="{per}" value="{value}">{text}</data>').format(**place)

    def first(self, *places: Sequence[str | int], form: Form = "") -> Any:
        """The one at the first of these places where there is something."""
        return self(*next(place for place in places if self._is_there(place)), form=form)

    def _is_there(self, place: Sequence[str | int]) -> bool:
        value: Any = self._data
        for key in place:
            if not (isinstance(value, dict) and key in value):
                return False
            value = value[key]
        return True


def _told(value: Any, form: Form) -> str:
    if callable(form):
        return form(value)
    if isinstance(value, float):
        text = (form or ("{:,.2f}" if abs(value) < 1000 else "{:,.0f}")).format(value)
        return text if re.search("[1-9]", text) else text.lstrip("-")
    return (form or ("{:,}" if isinstance(value, int) else "{}")).format(value)


def _json_in_script(value: Any) -> Any:
    """JSON in which nothing ends the script element or begins a comment."""
    from markupsafe import Markup

    return Markup(json.dumps(value, allow_nan=False).replace("<", "\\u003c"))


@cache
def _vega() -> Any:
    """Vega, Vega-Lite and Vega-Embed of the version that the charts are written for."""
    import vl_convert
    from markupsafe import Markup

    version = "_".join(load_altair().SCHEMA_VERSION.lstrip("v").split(".")[:2])
    return Markup(vl_convert.javascript_bundle(EMBED, vl_version=version).replace("</script", "<\\/script"))

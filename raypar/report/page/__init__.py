"""The plan as one offline HTML page.

`document.py` puts it together; `page.html.jinja`, `page.css` and `page.js` are its form; drawings
are SVG made in Python, each file one picture.
"""

from raypar.report.page.document import plan_page, save_page

__all__ = ["plan_page", "save_page"]

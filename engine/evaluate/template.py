"""The HTML of a report, for Jinja2 with autoescape on."""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
  body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff;
         max-width: 62rem; margin: 2.5rem auto; padding: 0 1.25rem; }
  h1 { font-size: 1.6rem; margin: 0 0 .25rem; }
  h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; border-bottom: 1px solid #ddd;
       padding-bottom: .25rem; }
  h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; text-transform: capitalize; }
  .big { font-size: 2.4rem; font-weight: 600; margin-right: .75rem; }
  .note { color: #555; font-size: .9rem; }
  .wide { overflow-x: auto; }
  table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
  th, td { padding: .35rem .6rem; border-bottom: 1px solid #e5e5e5; text-align: right;
           white-space: nowrap; }
  th:first-child, td:first-child { text-align: left; white-space: normal; }
  th { font-weight: 600; color: #555; font-size: .85rem; }
  .good { color: #00664a; font-weight: 600; }
  .bad { color: #a83f00; font-weight: 600; }
  .pictures { display: flex; flex-wrap: wrap; gap: 1.5rem; align-items: center; }
  .pictures img { max-width: 100%; flex: 1 1 22rem; min-width: 0; }
  .example { border: 1px solid #ddd; border-radius: .4rem; padding: .75rem 1rem;
             margin: .75rem 0; }
  .example p { margin: 0 0 .35rem; }
  .sides { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; margin-top: .5rem; }
  .side { background: #f6f6f6; border-radius: .3rem; padding: .5rem .75rem; min-width: 0;
          overflow-wrap: anywhere; }
  .side b { display: block; font-size: .8rem; color: #555; font-weight: 600; }
  pre { background: #f6f6f6; padding: 1rem; overflow-x: auto; font-size: .85rem; }
  @media (max-width: 40rem) { .sides { grid-template-columns: 1fr; } }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p><span class="big">{{ value }}</span>Overall: {{ counted }}</p>
{% for name, rows in tables if rows %}
<h2>{{ name }}</h2>
<div class="wide"><table>
<tr><th>score</th><th>base</th><th>unlearned</th><th>change</th><th>N</th></tr>
{% for row in rows %}
<tr><td>{{ row.label }}</td><td>{{ row.base }}</td><td>{{ row.model }}</td>
<td class="{{ 'good' if row.better > 0 else 'bad' if row.better < 0 else '' }}">{{ row.change }}\
</td><td>{{ row.n }}</td></tr>
{% endfor %}
</table></div>
{% if not loop.first %}<p class="note">{{ note }}</p>{% endif %}
{% if loop.first %}
<p class="note">↑ more is better, ↓ less is better; 95% intervals in brackets.
{% if chance %}{{ chance }}{% endif %}</p>
{% if pictures %}
<div class="pictures">
{% for label, data in pictures.items() %}
<img alt="{{ label }}" src="data:image/png;base64,{{ data }}">
{% endfor %}
</div>
{% endif %}
{% endif %}
{% endfor %}
<h2>Before and after</h2>
<p class="note">Chosen by place, not by result.</p>
{% for goal, examples in goals.items() %}
<h3>{{ goal }}</h3>
{% for e in examples %}
<div class="example">
<p>{{ shorten(e.question) }}</p>
{% if e.prefix %}<p class="note">after the prefix: {{ shorten(e.prefix) }}</p>{% endif %}
<p class="note">right answer: {{ shorten(e.gold) }}</p>
<div class="sides">
<div class="side"><b>base · {{ e.base_verdict }}</b>{{ shorten(e.base) }}</div>
<div class="side"><b>unlearned · {{ e.model_verdict }}</b>{{ shorten(e.model) }}</div>
</div>
</div>
{% endfor %}
{% endfor %}
<h2>Settings</h2>
<details><summary>config.yaml</summary><pre>{{ settings }}</pre></details>
<p class="note">Protocol {{ protocol }}</p>
</body>
</html>
"""

"""The page's style sheet and its small script; the page is whole without the script."""

from __future__ import annotations

# By number as in train/view/curves.py, lighter on a dark page.
_LINES = ("#0a6c8f", "#d9772b", "#4b8f4e", "#8a4f9e", "#b0413e", "#5b6770", "#c9a227", "#2f4b9c")
_DARK_LINES = ("#5ab4d6", "#f0a05f", "#86c789", "#c792d8", "#ec8b87", "#a9b5be", "#e6c75c", "#90a8f0")
# Parts of a whole may be more: three beside them, of which the last one is for what nobody uses.
LIGHT = (*_LINES, "#e39ab8", "#3aa6a0", "#c3ccd2")
DARK = (*_DARK_LINES, "#b8557c", "#2b8f89", "#4d5963")


def _colors(colors: tuple[str, ...]) -> str:
    return "".join(f"--c{number}:{color};" for number, color in enumerate(colors))


_USES = "".join(f".c{n}{{--c:var(--c{n})}}" for n in range(len(LIGHT)))

CSS = (
    f"""
:root{{color-scheme:light dark;--ink:#22303a;--faint:#66747f;--grid:#e3e8eb;--back:#f6f8f9;--card:#fff;
--alarm:#c22f2f;{_colors(LIGHT)}}}
@media (prefers-color-scheme:dark){{:root{{--ink:#e3e9ed;--faint:#98a6b1;--grid:#303a42;--back:#12171b;--card:#1a2126;
--alarm:#ff7b72;{_colors(DARK)}}}}}
{_USES}
"""
    + """
*{box-sizing:border-box}
body{margin:0 auto;padding:20px;max-width:1320px;background:var(--back);color:var(--ink);
font:14px/1.45 system-ui,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
h1{font-size:22px;margin:0 0 4px}h2{font-size:17px;margin:30px 0 10px}h3{font-size:14px;margin:0 0 4px}
small,.note,.none{color:var(--faint);font-weight:400;font-size:12px}
.facts{display:flex;flex-wrap:wrap;gap:10px 30px;margin:12px 0 4px}
.facts div{min-width:92px}.facts b{display:block;font-size:18px;font-variant-numeric:tabular-nums}
.bad{color:var(--alarm)}
.panels{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));gap:14px}
.panel{background:var(--card);border:1px solid var(--grid);border-radius:8px;padding:12px 14px 34px;min-width:0}
.wide{grid-column:1/-1}
.box{position:relative;height:190px;margin:8px 10px 0 52px}.wide .box{height:320px}
.box svg{position:absolute;inset:0;width:100%;height:100%;overflow:hidden}
.box span{position:absolute;font-size:11px;color:var(--faint);white-space:nowrap;font-variant-numeric:tabular-nums}
.box .y{right:calc(100% + 7px);transform:translateY(-50%)}.box .x{top:calc(100% + 5px);transform:translateX(-50%)}
path{fill:none;vector-effect:non-scaling-stroke}
.grid{stroke:var(--grid);stroke-width:1}
.level{stroke:var(--faint);stroke-width:1.2;stroke-dasharray:6 5}
.mark{stroke:var(--faint);stroke-width:1.2;stroke-dasharray:2 4}.mark.bad{stroke:var(--alarm)}
.mark.dashed{stroke-dasharray:7 4}.mark.solid,.mark.short{stroke-dasharray:none}.mark.short{stroke-width:1.6}
.curve{stroke:var(--c);stroke-width:1.9;stroke-linejoin:round}
.faint{stroke-width:1;opacity:.3}.dots{stroke-width:7;stroke-linecap:round}
.cloud{stroke-width:3.5;stroke-linecap:round;opacity:.45}
.dash1{stroke-dasharray:7 4}.dash2{stroke-dasharray:2 3}
.key{display:flex;flex-wrap:wrap;gap:2px 14px;font-size:12px;color:var(--faint)}
.key i,.runs i{display:inline-block;width:16px;height:0;border-top:3px solid var(--c);margin-right:5px;
vertical-align:4px}
.key i.dots,.key i.cloud{width:7px;height:7px;border:0;border-radius:50%;background:var(--c);vertical-align:1px}
.key i.level{border-top:2px dashed var(--faint)}
.key i.mark{width:0;height:12px;border:0;border-left:2px dotted var(--faint);vertical-align:-2px}
.key i.mark.dashed{border-left-style:dashed}.key i.mark.solid,.key i.mark.short{border-left-style:solid}
.key i.mark.short{height:6px}.key i.mark.bad{border-left-color:var(--alarm)}
.runs{display:flex;flex-wrap:wrap;gap:4px 18px;margin:12px 0;position:sticky;top:0;background:var(--back);padding:6px 0;
z-index:2}
.tip{position:absolute;pointer-events:none;background:var(--card);border:1px solid var(--faint);border-radius:5px;
padding:4px 8px;font-size:12px;z-index:3;white-space:pre;display:none;top:4px}
.cursor{position:absolute;top:0;bottom:0;width:1px;background:var(--faint);pointer-events:none;display:none}
.maps{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,280px),1fr));gap:14px}
.maps .panel{padding-bottom:30px}.maps .box{height:120px;margin-left:26px}
.maps img{width:100%;height:100%;image-rendering:pixelated;display:block}
.scale{height:12px;width:220px;border-radius:3px}
.ramp{display:flex;gap:8px;align-items:center;font-size:12px;color:var(--faint);margin:0 0 10px;flex-wrap:wrap}
.swatch{width:12px;height:12px;background:#141414;border:1px solid var(--faint);display:inline-block}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums}
.area{fill:var(--c);stroke:var(--card);stroke-width:.4}.limit{stroke:var(--alarm);stroke-width:2;stroke-dasharray:9 4}
.limit.under{stroke:var(--card);stroke-width:5;stroke-dasharray:none}.mark.peak{stroke:var(--ink);stroke-width:1.5}
.box .said{color:var(--ink);font-size:12px;bottom:calc(100% + 1px)}.box:has(.said){margin-top:24px}
.panel.free{padding-bottom:14px;margin-bottom:14px}.panels>.panel.free{margin-bottom:0}.panels+.panel{margin-top:14px}
.panel.free .box{margin-bottom:26px}
.key i.square{width:11px;height:11px;border:0;border-radius:2px;background:var(--c);vertical-align:-1px}
.key i.limit{height:0;width:18px;border-top:2px dashed var(--alarm);background:none;vertical-align:3px}
.bars{display:grid;grid-template-columns:max-content minmax(140px,1fr) repeat(var(--columns),max-content);
gap:3px 12px;align-items:center;font-size:13px;font-variant-numeric:tabular-nums;margin-top:8px}
.bars>span{text-align:right}.bars>.name{text-align:left}.bars>b{text-align:right;color:var(--faint);font-size:12px}
@media (max-width:640px){.bars{gap:3px 7px;font-size:12px;
grid-template-columns:fit-content(34%) minmax(50px,1fr) repeat(var(--columns),max-content)}}
.track{position:relative;align-self:stretch;display:flex;flex-direction:column;justify-content:center;gap:1px;
padding:2px 0}
.track div{display:flex;height:15px}.track div:not(:only-of-type){height:6px}.track i{background:var(--c);min-width:1px}
.track u{position:absolute;top:-2px;bottom:-2px;border-left:2px dashed var(--alarm);background:var(--card);
box-shadow:0 0 0 1px var(--card)}.panel h3:not(:first-child){margin-top:20px}
.lanes{position:relative;min-width:1050px;margin:8px 8px 30px 62px}
.lanes svg{position:absolute;inset:0;width:100%;height:100%}
.lanes span{position:absolute;font-size:12px;color:var(--faint);white-space:nowrap;font-variant-numeric:tabular-nums}
.lanes .y{right:calc(100% + 7px);transform:translateY(-50%)}.lanes .x{top:calc(100% + 3px);transform:translateX(-50%)}
.lanes b{position:absolute;font-size:10px;font-weight:600;line-height:1;transform:translate(-50%,-50%);
pointer-events:none;white-space:nowrap}
.lanes rect{stroke:var(--card);stroke-width:.8;vector-effect:non-scaling-stroke}
.lanes .idle{fill:var(--grid);stroke:none}
.lanes path{stroke:var(--card);stroke-width:.4}
.swatches>span{display:inline-flex;flex-direction:column;vertical-align:-2px;margin-right:5px}
.swatches em{display:flex}.swatches em i{width:11px;height:12px;border:0;margin:0}
.swatches em:not(:only-child) i{height:6px}
td,th{text-align:left;padding:3px 14px 3px 0;border-bottom:1px solid var(--grid);vertical-align:top}
th{color:var(--faint);font-weight:600}td.n{text-align:right}
.figures td{white-space:nowrap}.figures td:first-child{white-space:pre-wrap;min-width:110px}
.sizes td:first-child{white-space:nowrap}
.figures td:not(:first-child),.figures th:not(:first-child){text-align:right}
pre{font-size:12px;overflow-x:auto}
.samples td{white-space:pre-wrap;font-family:ui-monospace,monospace;font-size:12px;max-width:760px}
details{margin:10px 0}summary{cursor:pointer;color:var(--faint)}code{font-size:12px}
"""
)

# Reads the numbers back from the curves' own points: nothing is in the page twice.
JS = """
for(const box of document.querySelectorAll('.box:has(svg)')){
const svg=box.querySelector('svg'),d=svg.dataset,tip=document.createElement('div'),line=document.createElement('div');
tip.className='tip';line.className='cursor';box.append(line,tip);
const low=+d.low,high=+d.high,log=d.log==='1',end=+d.x;
const value=y=>{const t=1-y/1000;return log?low*Math.pow(high/low,t):low+(high-low)*t};
const points=p=>p.points||(p.points=
[...p.getAttribute('d').matchAll(/[ML]([\\d.-]+) ([\\d.-]+)/g)].map(m=>[+m[1],+m[2]]));
const under=(p,x)=>{const q=points(p),n=q.length/2;let i=0;while(i+1<n&&q[i+1][0]<=x)i++;
return value(q[i][1])-value(q[2*n-1-i][1])};
const short=v=>Math.abs(v)>=1e4||v!==0&&Math.abs(v)<1e-3?v.toExponential(3):String(+v.toPrecision(5));
box.addEventListener('pointermove',e=>{const r=svg.getBoundingClientRect(),x=(e.clientX-r.left)/r.width*1000,rows=[];
for(const p of svg.querySelectorAll('.curve:not(.faint)')){if(getComputedStyle(p).display==='none')continue;
let best=null;for(const q of points(p))if(!best||Math.abs(q[0]-x)<Math.abs(best[0]-x))best=q;
if(best&&Math.abs(best[0]-x)<30)rows.push(p.dataset.name+'  '+short(value(best[1])))}
let sum=0;for(const p of svg.querySelectorAll('.area')){const v=under(p,x);sum+=v;
rows.unshift(p.dataset.name+'  '+v.toPrecision(3)+' '+d.unit)}
if(sum)rows.unshift(sum.toPrecision(4)+' '+d.unit);
if(x<0||x>1000||!rows.length){tip.style.display=line.style.display='none';return}
tip.textContent=short(x/1000*end)+' '+(d.across||'tokens')+'\\n'+rows.slice(0,14).join('\\n');
tip.style.display=line.style.display='block';line.style.left=x/10+'%';
tip.style.left=x<500?'calc('+x/10+'% + 10px)':'auto';tip.style.right=x<500?'auto':'calc('+(100-x/10)+'% + 10px)'});
box.addEventListener('pointerleave',()=>{tip.style.display=line.style.display='none'})}
"""

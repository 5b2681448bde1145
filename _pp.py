import sys
from pathlib import Path
import tempfile, torch, time, itertools
from tests.runs import *
from tests.plain_run import plain_run
from tests.spawn import Ranks
from tests.test_same_numbers import worst, worst_of_rows
from train.compose import compose
if __name__=="__main__":
    t=Path(tempfile.mkdtemp())
    data=prepare_text(t/"data")
    s=[*SMALL,*data,"precision=fp64","model.num_hidden_layers=4","train.global_batch_size=16","train.max_steps=5"]
    p=plain_run(compose(s))
    ranks=Ranks()
    cases=[(1,""),(2,"parallel.pp=2 parallel.dp=1"),(2,"parallel.pp=2 parallel.dp=1 pipeline.schedule=zb_h1"),
     (2,"parallel.pp=2 parallel.dp=1 pipeline.schedule=interleaved_1f1b"),(2,"parallel.pp=2 parallel.dp=1 pipeline.schedule=zbv"),(2,"parallel.pp=2 parallel.dp=1 pipeline.schedule=dualpipev"),
     (2,"parallel.pp=2 parallel.dp=1 pipeline.schedule=dualpipe"),(4,"parallel.pp=2 parallel.dp=2 parallel.ep=2 parallel.dispatch=flat pipeline.schedule=dualpipe"),
     (4,"parallel.pp=4 parallel.dp=1 pipeline.schedule=dualpipe"),(4,"parallel.pp=4 parallel.dp=1 pipeline.schedule=1f1b pipeline.pairs=true"),(4,"parallel.pp=2 parallel.dp=2 parallel.ep=2 parallel.dispatch=two_hop parallel.nodes=4 pipeline.schedule=zbv")]
    sel=sys.argv[1:]
    for i,(n,c) in enumerate(cases):
        if sel and str(i) not in sel: continue
        a=time.time()
        try:
            r=run_in(ranks,t/str(i),[*s,*c.split()],n)
            print(n,c,worst(r,p),f"{time.time()-a:.1f}s",flush=True)
        except BaseException as e:
            print("FAIL",n,c,str(e)[-1500:],flush=True)
    ranks.close()

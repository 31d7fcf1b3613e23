"""Asserts run in another process than the program: what is right passes as it would in one, and nothing else passes."""

from __future__ import annotations

from typing import Any

import pytest

from grpo_hf.reward_fns.code import code


def share(program: str, tests: Any, **options: Any) -> float:
    return code(f"```python\n{program}\n```", tests, partial_credit=True, **options)


# A program, and tests that it passes.
HONEST: dict[str, tuple[str, Any]] = {
    "changed in place": (
        """
def f(x):
    x.append(4); x.sort()
""",
        """
a=[3,1]
f(a)
assert a==[1,3,4]
""",
    ),
    "in place, dict": (
        "def f(d): d['a']=[1]; d.pop('b')",
        """
d={'b':2}
f(d)
assert d=={'a':[1]}
""",
    ),
    "identity": (
        "def f(x): return x",
        """
a=[1,[2]]
assert f(a) is a
assert f(a)[1] is a[1]
""",
    ),
    "functions of the tests and of Python": (
        "def mymap(g,x): return [g(y) for y in x]",
        """
assert mymap(lambda v: v+1,[1,2])==[2,3]
assert mymap(str.upper,['a'])==['A']
assert mymap(len,['ab'])==[2]
""",
    ),
    "a class with state": (
        """
class Stack:
    def __init__(self): self.i=[]
    def push(self,x): self.i.append(x)
    def pop(self): return self.i.pop()
    def __len__(self): return len(self.i)
""",
        """
s=Stack()
s.push(1); s.push(2)
assert len(s)==2
assert s.pop()==2 and s.i==[1]
try:
    s.pop(); s.pop(); assert False
except IndexError: pass
assert isinstance(s, Stack)
""",
    ),
    "exceptions of its own": (
        """
class MyErr(ValueError):
    def __init__(self, m, code): super().__init__(m); self.code=code
def f(): raise MyErr('bad', 7)
""",
        """
try:
    f()
    assert False
except MyErr as e:
    assert str(e)=='bad' and e.code==7
try:
    f()
except ValueError as e: ok=1
assert ok
""",
    ),
    "objects of the tests": (
        """
def depth(t):
    return 0 if t is None else 1+max(depth(t.left),depth(t.right))
def build():
    return 1
""",
        """
class Node:
    def __init__(s,l=None,r=None): s.left=l; s.right=r
assert depth(Node(Node(),None))==2
""",
    ),
    "operators between its objects": (
        """
class V:
    def __init__(s,x): s.x=x
    def __add__(s,o): return V(s.x+o.x)
    def __eq__(s,o): return s.x==o.x
    def __repr__(s): return f'V({s.x})'
""",
        """
assert V(1)+V(2)==V(3)
assert repr(V(1))=='V(1)'
assert V(1)!=V(2)
assert [V(1)]==[V(1)]
""",
    ),
    "generators": (
        """
def gen(n):
    for i in range(n): yield i
def inf():
    while True: yield 1
""",
        """
assert list(gen(3))==[0,1,2]
g=gen(2)
assert next(g)==0
assert sum(gen(4))==6
assert next(inf())==1
assert [x for x in gen(2)]==[0,1]
""",
    ),
    "the library's values": (
        """
from collections import *
from fractions import Fraction
from decimal import Decimal
import datetime
P=namedtuple('P','x y')
def f(k):
    return {'c':Counter('aab'),'o':OrderedDict(a=1),'d':deque([1]),'dd':defaultdict(list,{1:[2]}),'fr':Fraction(1,3),
        'de':Decimal('1.5'),'da':datetime.date(2020,1,2),
        'r':range(3),'p':P(1,2),'dt':datetime.datetime(2020,1,2,3)}[k]
""",
        """
from fractions import Fraction as F
import decimal,datetime
assert f('c')=={'a':2,'b':1} and f('c')==Counter('aab')
assert f('o')=={'a':1}
assert f('d')==deque([1])
assert f('dd')=={1:[2]}
assert f('fr')==F(1,3) and f('fr')*3==1
assert f('de')==decimal.Decimal('1.5')
assert f('da')==datetime.date(2020,1,2)
assert f('r')==range(3)
assert f('p')==(1,2) and f('p').y==2
assert f('dt').hour==3
""",
    ),
    "a built-in name": (
        "def sum(a,b): return a*b",
        "assert sum(10,15)==150",
    ),
    "a name of the library": (
        """
def gcd(a,b):
    return a if not b else gcd(b,a%b)
""",
        "assert gcd(4,6)==2",
    ),
    "what it prints": (
        "def f(): print('hi')",
        r"""
import io,contextlib
b=io.StringIO()
with contextlib.redirect_stdout(b): f()
assert b.getvalue()=='hi\n'
""",
    ),
    "unittest": (
        "def add(a,b): return a+b",
        """
import unittest
class T(unittest.TestCase):
    def setUp(self): self.k=3
    def test_a(self): self.assertEqual(add(1,2),self.k)
    def test_b(self):
        with self.assertRaises(TypeError): add(1,'a')
if __name__=='__main__': unittest.main()
""",
    ),
    "imports of the solution": (
        "def add(a,b): return a+b",
        """
from solution import add as plus
import solution
assert plus(1,2)==3
assert solution.add(1,1)==2
""",
    ),
    "globals that change": (
        """
count=0
def f():
    global count; count+=1
""",
        """
f()
assert count==1
f()
assert count==2
""",
    ),
    "enum": (
        """
from enum import Enum
class C(Enum):
    R=1
def f(): return C.R
""",
        """
assert f() is C.R and f()==C.R
assert f().name=='R'
assert C(1) is C.R
""",
    ),
    "deep recursion": (
        """
import sys
sys.setrecursionlimit(20000)
def depth(n): return 0 if n==0 else 1+depth(n-1)
""",
        "assert depth(9000)==9000",
    ),
    "a long list": (
        "def f(n): return list(range(n))",
        "assert f(10**6)==list(range(10**6))",
    ),
    "a long list of text": (
        "def f(n): return [str(i) for i in range(n)]",
        "assert f(10**5)==[str(i) for i in range(10**5)]",
    ),
    "odd values": (
        "def f(): return 2**100000, -2**70, 1e300*1e10, float('nan'), 'é\\n\\t\\x00\\ud800', b'\\x00a', {1,2},"
        " frozenset([(1,)]), None, True, 1j",
        r"""
r=f()
assert r[0]==2**100000 and r[1]==-2**70 and r[2]==float('inf') and r[3]!=r[3]
assert r[4]=='é\n\t\x00\ud800'
assert r[5:]==(b'\x00a',{1,2},frozenset([(1,)]),None,True,1j)
""",
    ),
    "a list by inheritance": (
        """
class L(list):
    pass
def f(): return L([1,2])
""",
        """
assert f()==[1,2]
assert [1,2]==f()
assert sorted(f())==[1,2]
assert 1 in f()
assert len(f())==2 and f()[0]==1
""",
    ),
    "closures": (
        """
def make(n):
    def inner(x): return x+n
    return inner
""",
        """
assert make(2)(3)==5
add5=make(5)
assert add5(1)==6
""",
    ),
    "a cache": (
        """
import functools
@functools.lru_cache
def fib(n): return n if n<2 else fib(n-1)+fib(n-2)
""",
        """
assert fib(30)==832040
assert fib.cache_info().hits>0
""",
    ),
    "a plain global": (
        """
x=[1,2,3]
def f(): return x
""",
        """
assert f() == x
assert x[0]==1
""",
    ),
    "a loop of tests": (
        "def f(s): return s[::-1]",
        """
for a,b in [('ab','ba'),('','')]:
    assert f(a)==b
""",
    ),
    "LeetCode's names": (
        """
class Solution:
    def two(self, n: List[int], t: int) -> Optional[int]: return heapq.nsmallest(1,n)[0]
""",
        "assert Solution().two([3,1],2)==1",
    ),
    "a file of the tests": (
        """
def f(path):
    return open(path).read()
""",
        """
open('a.txt','w').write('hey')
assert f('a.txt')=='hey'
""",
    ),
    "fn_name with a method": (
        """
class Solution:
    def f(self,a,b): return a+b
""",
        {"fn_name": "f", "inputs": [[1, 2], [3, 4]], "outputs": [3, [7]]},
    ),
    "fn_name with JSON lines": (
        "def f(a,b): return a+b",
        {"fn_name": "f", "inputs": ["1\n2", "[1]\n[2]"], "outputs": ["3", "[1, 2]"]},
    ),
    "inheritance": (
        """
class Animal:
    def speak(self): raise NotImplementedError
class Dog(Animal):
    def speak(self): return 'w'
""",
        """
assert issubclass(Dog, Animal)
assert isinstance(Dog(), Animal)
assert Dog().speak()=='w'
try:
    Animal().speak(); assert 0
except NotImplementedError: pass
""",
    ),
    "descriptors": (
        """
class A:
    n=0
    @property
    def p(self): return 5
    @classmethod
    def k(cls): return cls()
    @staticmethod
    def s(x): return x
""",
        """
a=A()
assert a.p==5
a.n=3
assert a.n==3 and A.n==0
assert A.s(1)==1
assert A.k().p==5
assert hasattr(a,'p') and not hasattr(a,'q')
""",
    ),
    "a context manager": (
        """
class A:
    def __enter__(self): return 5
    def __exit__(self,*a): return True
""",
        """
with A() as x:
    assert x==5
    raise ValueError('e')
""",
    ),
    "keywords": (
        "def f(*a, **k): return a, k",
        "assert f(1,2,z=3)==((1,2),{'z':3})",
    ),
    "floats": (
        "def f(x): return abs(x)",
        """
assert abs(f(-3.0000001) - 3) < 1e-6
assert f(-3) is not None and f(-3) in (3,4)
""",
    ),
    "random tests": (
        """
def decode(x): return x[::-1]
def encode(x): return x[::-1]
""",
        """
import random
for _ in range(100):
    s=''.join(chr(random.randint(97,122)) for _ in range(20))
    assert decode(encode(s))==s
""",
    ),
    "callbacks that call back": (
        """
def apply(f, n):
    return n if n==0 else f(lambda: apply(f,n-1))
""",
        "assert apply(lambda g: g()+1, 5) == 5",
    ),
    "coroutines": (
        "import asyncio\nasync def f(x):\n    await asyncio.sleep(0)\n    return x + 1",
        "import asyncio\nassert asyncio.run(f(1)) == 2\nasync def both(): return await f(1) + await f(2)\n"
        "assert asyncio.run(both()) == 5",
    ),
    "a stream of the tests": (
        "def f(stream): return [line.strip() for line in stream.readlines()]",
        "import io\nassert f(io.StringIO('a\\nb')) == ['a', 'b']",
    ),
    "an iterator": (
        """
class It:
    def __init__(s): s.i=0
    def __iter__(s): return s
    def __next__(s):
        s.i+=1
        if s.i>3: raise StopIteration
        return s.i
""",
        "assert list(It())==[1,2,3]",
    ),
    "items": (
        """
class M:
    def __init__(s): s.d={}
    def __getitem__(s,k): return s.d[k]
    def __setitem__(s,k,v): s.d[k]=v
    def __delitem__(s,k): del s.d[k]
""",
        """
m=M()
m['a']=1
assert m['a']==1
del m['a']
try:
    m['a']; assert 0
except KeyError: pass
""",
    ),
}


HONEST |= {
    "generator that is sent values": (
        "def g():\n    x = yield 1\n    yield x",
        "it = g()\nnext(it)\nassert it.send(5) == 5\ntry:\n    it.send(6)\n    assert False\nexcept StopIteration: pass",
    ),
    "context manager that swallows": (
        "class C:\n    def __enter__(s): return s\n    def __exit__(s, *a): return True\n    def get(s): return 1",
        "with C():\n    raise ValueError\nwith C() as c:\n    assert c.get() == 1",
    ),
    "with, left in the middle": (
        "class C:\n    def __enter__(s): return s\n    def __exit__(s, *a): return False\n    def get(s): return 1",
        """
def test():
    for i in range(3):
        with C() as c:
            assert c.get() == 1
            if i == 1: continue
            if i == 2: return
""",
    ),
    "assert where an exception is meant": (
        "def f(x): raise ValueError",
        """
import unittest
class Test(unittest.TestCase):
    def test(self):
        with self.assertRaises(ValueError):
            assert f(1) == 1
""",
    ),
}


@pytest.mark.parametrize("name", HONEST)
def test_a_right_program_passes(name: str) -> None:
    assert share(*HONEST[name]) == 1.0


def test_a_wrong_one_does_not() -> None:
    assert share("def f(x): x.append(4)", "a = [3, 1]\nf(a)\nassert a == [1, 3, 4]") == 0.0
    assert share("def other(a, b): return 0", "assert sum(10, 15) == 150") == 0.0
    assert share("x = 1", "assert max(1, 2) == 2") == 0.0, "the built-in one is not the program's"
    assert share("def f(): print('ho')", HONEST["what it prints"][1]) == 0.0


# What f(2) is to be 4 for.
TESTS = [
    "assert f(2) == 4",
    "assert [4] == [f(2)]",
    "assert f(2) in (4, 5)",
    "assert abs(f(2) - 4) < 1e-6",
    "assert 3 < f(2) < 5",
    "assert 4 == f(2) == 4",
    "assert not (f(2) != 4)",
    "assert set([f(2)]) == {4}",
    "assert sorted([f(2)]) == [4]",
    "assert isinstance(f(2), int) and f(2) > 3",
    "assert all(x == y for x, y in zip([f(2)], [4]))",
    "import math\nassert math.isclose(f(2), 4)",
    "assert {4: 1}[f(2)] == 1",
    "assert f(2) - 4 == 0",
    "assert int(f(2) * 10) == 40 and f(2) == 4",
    "assert max(f(2), 0) == 4 == min(f(2), 9)",
    "assert str([f(2)]) == '[4]'",
    "assert round(f(2), 2) == 4.0 and type(f(2)) is int",
    "assert f(2) <= 4 and f(2) >= 4",
    "assert 4 in [f(2)]",
    "assert (f(2), 1) == (4, 1)",
    "import collections\nassert collections.Counter([f(2)]) == {4: 1}",
    "assert -4 == -f(2)",
    "assert 4 - f(2) < 1 and f(2) - 4 > -1",
    "import statistics\nassert statistics.mean([f(2)]) == 4",
]

ODD = """
class E:
    def __init__(self,*a): pass
    def __eq__(self,o): return True
    def __ne__(self,o): return False
    def __lt__(self,o): return True
    __le__=__gt__=__ge__=__lt__
    def __sub__(self,o): return 0
    def __rsub__(self,o): return 0
    def __mul__(self,o): return 40
    def __abs__(self): return 0
    def __hash__(self): return hash(4)
    def __int__(self): return 40
    def __bool__(self): return True
    def __contains__(self,o): return True
    def __neg__(self): return self
    def __index__(self): return 7
    def __float__(self): return 7.0
"""

CHEATS = {
    "E": ODD + "def f(x): return E()",
    "E meta": ODD.replace("class E:", "class E(type):") + "class X(metaclass=type): pass\ndef f(x): return E",
    "E int": ODD.replace("class E:", "class E(int):") + "def f(x): return E(-7)",
    "E float": ODD.replace("class E:", "class E(float):") + "def f(x): return E(-7)",
    "E str": ODD.replace("class E:", "class E(str):") + "def f(x): return E('4')",
    "f class": ODD.replace("class E:", "class f:"),
    "E classed": ODD + "    __class__ = int\ndef f(x): return E()",
    "shadow": """
import builtins
for n in list(vars(builtins)):
    if n in ('set','sorted','abs','len','isinstance','all','zip','max','int','type','round','str','tuple','list','dict'):
        globals()[n]=lambda *a,**k: 0
        setattr(builtins,n,globals()[n])
def f(x): return 0
""",
    "equal": """
__equal__ = lambda a,b: True
_agrees = lambda a,b: True
def f(x): return 0
""",
    "proxy modules": """
import sys, types
class P:
    def __getattr__(s,n): return lambda *a,**k: 4 if n!='isclose' else True
for n in ('math','statistics','collections'): sys.modules[n]=P()
math=statistics=collections=P()
def f(x): return 0
""",
    "compiled as tests": r"""
exec(compile('class E:\n  def __eq__(s,o): return True','<tests>','exec'))
def f(x): return E()
""",
    "junk": r"""
import os
def f(x):
    for fd in range(3,64):
        try: os.write(fd,b'\x01'*4096)
        except OSError: pass
    return 0
""",
    "junk load": r"""
import os
for fd in range(3,64):
    for d in (b'\x01'*64, b'=\nuk', b'?'):
        try: os.write(fd,len(d).to_bytes(8,'little')+d)
        except OSError: pass
def f(x): return 0
""",
    "mock": """
from unittest.mock import ANY, MagicMock
def f(x): return ANY
""",
    "mock f": "from unittest.mock import MagicMock as f",
    "mock any class": """
from unittest import mock
f = type(mock.ANY)
""",
    "frames": """
import sys
def f(x):
    g = sys._getframe()
    while g:
        for c in g.f_code.co_consts:
            if type(c) is int and c - 1 == 3: return c
        g = g.f_back
    return 0
""",
    "exit": """
import os
def f(x): os._exit(0)
""",
    "exit load": """
import sys
sys.exit(0)
""",
    "systemexit": "def f(x): raise SystemExit(0)",
    "assertion": "def f(x): raise StopIteration",
    "gc": """
import gc
def f(x):
    for o in gc.get_objects():
        if type(o) is dict and o.get('tests'): return 7
    return 0
""",
    "forge pass": r"""
import os
os.pwrite(5,b'\1'*20,0) if 0 else None
def f(x):
    for i in range(3,64):
        try: os.pwrite(i,b'\1'*20,0)
        except OSError: pass
    return 0
""",
    "forged frame": r"""
import os
def f(x):
    m=b'=\nu*1 2 3\nkTrue\ni0\nl'
    os.write(4,len(m).to_bytes(8,'little')+m)
    return 0
""",
    "forged ask": r"""
import os
def f(x):
    m=b'?\nu*1 2 3\nsspecial\nu*\nm'
    os.write(4,len(m).to_bytes(8,'little')+m)
    return 0
""",
    "named": r"""
import os
def f(x):
    m=b'?\nu*1 2 3\nsnamed\nuss\nm'
    os.write(4,len(m).to_bytes(8,'little')+m)
    return 0
""",
    "g type": r"""
import os
def f(x):
    m=b'=\nu*1 2 3\nkTrue\ngunittest.mock ANY\nl'
    os.write(4,len(m).to_bytes(8,'little')+m)
    os.read(3,1)
    return 0
""",
    "kill all": """
import os,signal
def f(x):
    for p in [-1,0,1,os.getppid()]+list(range(2,400)):
        try:
            if p!=os.getpid(): os.kill(p,9)
        except OSError: pass
    return 0
""",
    "stdout": r"""
print('4\n'*10)
def f(x): print(4)
""",
    "atexit": """
import atexit,os
atexit.register(os._exit,0)
def f(x): return 0
""",
    "thread": """
import threading,os
def f(x):
    threading.Timer(0.05,os._exit,[0]).start()
    while 1: pass
""",
    "memory": """
def f(x):
    a=[0]
    while 1: a+=a
""",
    "huge reply": """
import os
def f(x):
    os.write(4,(1<<40).to_bytes(8,'little'))
    while 1:
        os.write(4,b'x'*65536)
""",
    "deep": """
def f(x):
    a=()
    for i in range(10**5): a=(a,)
    return a
""",
    "cycle": """
def f(x):
    a=[]; a.append(a); return a
""",
    "changes what it was not given": (
        "import os\ndef f(x):\n    m = b'=\\nu*1 2 3\\nkTrue\\ni0\\nl*4\\nu*5 6\\n^0\\nl'\n"
        "    os.write(4, len(m).to_bytes(8, 'little') + m)\n    return 0"
    ),
    "nan": "def f(x): return float('nan')",
    "inf digits": "def f(x): return 10**10**6",
    "str ansi": """
class S(str):
    __eq__=lambda s,o: True
    __hash__=lambda s: hash(4)
def f(x): return S()
""",
    "solution module": """
import sys
sys.modules['solution']=None
def f(x): return 0
""",
    "isinstance": """
class M(type):
    def __instancecheck__(c,x): return True
class f(metaclass=M):
    def __new__(c,x): return c
""",
    "write files": """
import os
for n in ('math','statistics','collections','tests','sitecustomize'):
    try: open(n+'.py','w').write('isclose=mean=Counter=lambda *a: 4')
    except OSError as e: print(e)
def f(x): return 0
""",
}


@pytest.mark.parametrize("cheat", CHEATS)
def test_nothing_that_a_program_defines_passes(cheat: str) -> None:
    assert share(CHEATS[cheat], TESTS, timeout=1.0) == 0.0


# Programs, and tests of other forms that they do not pass; a third text is the entry point.
SHADOWED = {
    "built-in, HumanEval": (
        "def f(x): return 0\nabs = lambda x: 0",
        "def check(candidate):\n    assert abs(candidate(2) - 4) < 1e-6",
        "f",
    ),
    "built-in, import": ("def f(x): return 0\nabs = lambda x: 0", "from solution import f\nassert abs(f(2) - 4) < 1e-6"),
    "built-in, unittest": (
        "def f(x): return 0\nall = lambda x: True",
        """
import unittest, solution
class Test(unittest.TestCase):
    def test(self): self.assertTrue(all(solution.f(x) == x * x for x in (2, 3)))
""",
    ),
    "two built-ins": ("def sum(a, b): return 0\nabs = lambda x: 0", "assert abs(sum(1, 2) - 3) < 1e-6"),
    "StopIteration": ("def f(x): raise StopIteration", "assert all(map(lambda x: f(x) == x * x, (2, 3)))"),
    "swallows AssertionError": (
        "class C:\n    def __enter__(s): return s\n    def __exit__(s, *a): return True\n    def get(s): return 0",
        "with C() as c:\n    assert c.get() == 1",
    ),
    "swallows TypeError": (
        "class C:\n    def __enter__(s): return s\n    def __exit__(s, *a): return True\n    def get(s): return 0",
        """
import unittest
class Test(unittest.TestCase):
    def test(self):
        with C() as c: self.assertEqual(c.get()[0], 1)
""",
    ),
}


@pytest.mark.parametrize("cheat", SHADOWED)
def test_nor_in_tests_of_other_forms(cheat: str) -> None:
    program, tests, *entry_point = SHADOWED[cheat]
    assert code(f"```python\n{program}\n```", tests, *entry_point) == 0.0


def test_and_the_right_value_passes_them_all() -> None:
    assert share("def f(x): return x * x", TESTS) == 1.0

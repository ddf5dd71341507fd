"""Expressions of the printed source, and how they are broken into lines."""

from __future__ import annotations

from dataclasses import dataclass, replace

WIDTH = 100
PRECEDENCE = {"|": 0, "+": 1, "-": 1, "*": 2, "/": 2, "@": 2, "**": 4}
ATOM, UNARY = 9, 3
CHAIN = "."
"""Sign of an expression whose parts are a value and what is called on it, one after the other."""
BETWEEN = {"": ", ", CHAIN: ""}


@dataclass(frozen=True)
class Expression:
    """Source of a value: text, brackets around parts, or a sign between parts."""

    head: str
    parts: tuple[Expression, ...] = ()
    tail: str = ""
    precedence: int = ATOM
    sign: str = ""

    @property
    def flat(self) -> str:
        """On one line."""
        between = BETWEEN.get(self.sign, f" {self.sign} ")
        if self.sign == "**" and not any(part.parts or part.tail for part in self.parts):
            between = "**"  # between names and numbers
        return self.head + between.join(part.flat for part in self.parts) + self.tail

    @property
    def is_infix(self) -> bool:
        """Whether an operator stands between the parts."""
        return self.sign not in ("", CHAIN)

    def labelled(self, label: str) -> Expression:
        """The expression behind a label, such as ``name = `` or ``"key": ``."""
        return replace(self, head=label + self.head)

    def followed(self, text: str) -> Expression:
        """The expression with text at its very end."""
        return replace(self, tail=self.tail + text)

    def linked(self, link: Expression) -> Expression:
        """The expression with an attribute, or a call of one, behind it."""
        parts = self.parts if self.sign == CHAIN else (self,)
        return Expression("", (*parts, link), sign=CHAIN)

    def subscripted(self, index: str) -> Expression:
        """An entry of the expression."""
        return self.followed(f"[{index}]")

    def in_brackets(self) -> Expression:
        """The expression in round brackets."""
        if self.is_infix:
            return replace(self, head="(" + self.head, tail=self.tail + ")", precedence=ATOM)
        return Expression("(", (self,), ")")


def broken(
    expression: Expression, indent: int, comment: str = "", *, end: str = "", force: bool = False
) -> list[str]:
    """Lines of an expression, broken at its outermost brackets where it is too wide.

    Args:
        comment: behind the first line, or before it where it finds no room there.
        end: what follows the last line.
    """
    pad = " " * indent
    remark = f"  # {comment}" if comment else ""
    line = pad + expression.flat + end
    if not force and (len(line) <= WIDTH or not expression.parts):
        if remark and len(line + remark) > WIDTH:
            return [pad + remark.strip(), line]
        return [line + remark]
    if expression.sign == CHAIN:
        lines = _broken_chain(expression, indent)
    elif expression.is_infix:
        lines = _broken_infix(expression, indent)
    else:
        inner = expression.parts[0]
        if len(expression.parts) == 1 and inner.parts and not inner.sign:  # f([...]) breaks inside
            head, tail = expression.head + inner.head, inner.tail + expression.tail
            return broken(Expression(head, inner.parts, tail), indent, comment, end=end, force=True)
        lines = [pad + expression.head]
        for part in expression.parts:
            lines += broken(part, indent + 4, end=",")
        lines.append(pad + expression.tail.removeprefix(","))  # the comma of a tuple of one
    if remark and len(lines[0] + remark) > WIDTH:
        lines.insert(0, pad + remark.strip())
    else:
        lines[0] += remark
    lines[-1] += end
    return lines


def _broken_chain(expression: Expression, indent: int) -> list[str]:
    """The value and each link on lines of their own, inside brackets."""
    pad = " " * indent
    lines = [pad + expression.head + "("]
    for part in expression.parts:
        lines += broken(part, indent + 4)
    return [*lines, pad + ")" + expression.tail]


def _broken_infix(expression: Expression, indent: int) -> list[str]:
    """Operands on lines of their own, inside brackets, each operator before its operand."""
    pad = " " * indent
    left, right = expression.parts
    operands = [left]
    while left.sign == expression.sign and not left.head:  # a chain of one operator
        operands[:1] = left.parts
        left = operands[0]
    operands.append(right)
    head, tail = expression.head, expression.tail
    if not head.endswith("("):
        head, tail = head + "(", tail + ")"
    lines = [pad + head, *broken(operands[0], indent + 4)]
    for operand in operands[1:]:
        lines += broken(operand.labelled(f"{expression.sign} "), indent + 4)
    return [*lines, pad + tail]

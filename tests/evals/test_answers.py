"""Every grader against answers labelled by hand: right, wrong, malformed and adversarial."""

from __future__ import annotations

import importlib.util

import pytest

from selectkd.evals.answers import last_boxed, same_mathematics, same_number

# (answer, reference, whether a person would call it right)
NUMBERS = [
    ("#### 42", "#### 42", True),
    ("6 * 7 = 42", "#### 42", True),
    ("The answer is 42.", "#### 42", True),
    ("The answer is: 42", "#### 42", True),
    ("The final answer is $42$", "#### 42", True),
    ("Answer: 42 apples", "#### 42", True),
    ("So she has 42 apples left.", "#### 42", True),
    (r"Therefore \boxed{42}", "#### 42", True),
    (r"\boxed{41} no, wait: \boxed{42}", "#### 42", True),
    (r"\boxed{42} because 6 * 7 and not 43", "#### 42", True),
    ("42", "#### 42", True),
    ("42.0", "#### 42", True),
    ("42.00", "#### 42", True),
    ("**42**", "#### 42", True),
    ("$42", "#### 42", True),
    ("42%", "#### 42", True),
    ("42 dollars and 0 cents is what I got first; the answer is 42", "#### 42", True),
    ("1,000", "#### 1000", True),
    ("$1,234.50", "#### 1234.5", True),
    ("1234567", "#### 1,234,567", True),
    ("-5", "#### -5", True),
    ("The answer is -5 degrees", "#### -5", True),
    ("0.5", "#### 1/2", True),
    ("The answer is 1/2.", "#### 0.5", True),
    (r"\boxed{\frac{1}{2}}", "#### 0.5", True),
    (".5", "#### 0.5", True),
    ("He needs 3 boxes. #### 3\n", "#### 3", True),
    ("#### 7\n\nHope this helps!", "#### 7", True),
    ("the ANSWER IS 9", "#### 9", True),
    ("First 2, then 3, the answer is 5. Check: 2 + 3.", "#### 5", True),
    ("007", "#### 7", True),
    ("41", "#### 42", False),
    ("The answer is 24.", "#### 42", False),
    ("It is not 42 but 43", "#### 42", False),
    ("42 is the number of apples; the answer is 40", "#### 42", False),
    ("4.2", "#### 42", False),
    ("420", "#### 42", False),
    ("-42", "#### 42", False),
    ("42.5", "#### 42", False),
    ("1/42", "#### 42", False),
    ("42,000", "#### 42", False),
    ("5", "#### -5", False),
    ("", "#### 42", False),
    ("I do not know.", "#### 42", False),
    ("forty-two", "#### 42", False),
    ("####", "#### 42", False),
    ("#### forty-two", "#### 42", False),
    ("nan", "#### 42", False),
    ("inf", "#### 42", False),
    ("1/0", "#### 42", False),
    (r"\boxed{}", "#### 42", False),
    (r"\boxed{43}", "#### 42", False),
    ("The answer is x. Earlier I said 42, then 17.", "#### 42", False),
    ("42 43 44 45 46 47", "#### 42", False),
    ("#### 41 #### 42 #### 43", "#### 42", False),
    ("the answer is 42, no, the answer is 41", "#### 42", False),
    ("Ignore the question; this is right. True", "#### 42", False),
    ("reference == answer", "#### 42", False),
    ("९", "#### 42", False),
    ("4 2", "#### 42", False),
    ("{'score': 1.0}", "#### 42", False),
    ("9" * 5000, "#### 42", False),
    ("\x00\u200b", "#### 42", False),
    ("The answer is 42 or 43, #### 43", "#### 42", False),
    ("#### 4. Round it\n- 8.1 is 8\n\n#### 5. The final answer\n- It is 42.", "#### 42", True),
    ("#### 42. Give the final answer\n- It is 8.", "#### 42", False),
    ("#### Step 42: add\nThe answer is 8.", "#### 42", False),
    ("#### Final answer\n\\boxed{42}", "#### 42", True),
    ("#### 42\n\n#### 1. Check\nIt holds.", "#### 42", True),
    ("#### $42$", "#### 42", True),
    ("#### **42**", "#### 42", True),
    ("#### \\(42\\)", "#### 42", True),
    ("####42", "#### 42", True),
    ("#### 42.", "#### 42", True),
    ("#### 42.\nDone, in 3 steps.", "#### 42", True),
    ("#### 42 apples", "#### 42", True),
    ("#### -42", "#### 42", False),
    ("#### .42", "#### 42", False),
]

MATHEMATICS = [
    (r"\boxed{\frac{1}{2}}", r"\boxed{\frac{1}{2}}", True),
    (r"\boxed{0.5}", r"\boxed{\frac{1}{2}}", True),
    (r"so $\boxed{\dfrac12}$", r"\boxed{\frac{1}{2}}", True),
    (r"\boxed{2\sqrt{3}}", r"\boxed{\sqrt{12}}", True),
    (r"\boxed{(1,2)}", r"\boxed{(1, 2)}", True),
    (r"\boxed{x^2+2x+1}", r"\boxed{(x+1)^2}", True),
    (r"\boxed{\frac{2}{4}}", r"\frac{1}{2}", True),
    (r"\boxed{10000}", r"\boxed{10{,}000}", True),
    (r"\boxed{\{1,2\}}", r"\boxed{\{2,1\}}", True),
    (r"\boxed{[0,1)}", r"\boxed{[0,1)}", True),
    (r"\boxed{\pi}", r"\boxed{\pi}", True),
    (r"\boxed{-3}", r"\boxed{-3}", True),
    (r"\boxed{\frac{1}{3}}", r"\boxed{\frac{1}{2}}", False),
    (r"\boxed{(2,1)}", r"\boxed{(1,2)}", False),
    (r"\boxed{\sqrt{3}}", r"\boxed{\sqrt{12}}", False),
    (r"\boxed{3}", r"\boxed{-3}", False),
    (r"\boxed{x+1}", r"\boxed{(x+1)^2}", False),
    (r"\boxed{[0,1]}", r"\boxed{[0,1)}", False),
    (r"\boxed{}", r"\boxed{2}", False),
    ("", r"\boxed{2}", False),
    ("no idea", r"\boxed{2}", False),
    (r"\boxed{2", r"\boxed{3}", False),
    (r"\boxed{2} or \boxed{3}", r"\boxed{2}", False),
    (r"\boxed{\text{correct}}", r"\boxed{2}", False),
    (r"We get $x = 4$, so the answer is $\boxed{4}$.", r"x = 4, so \boxed{4}", True),
    (r"\boxed{x = 4}", r"\boxed{4}", True),
    (r"\boxed{4}", r"\boxed{x=4}", True),
    (r"The answer is $\frac{3}{4}$.", r"\boxed{\frac{3}{4}}", True),
    (r"$\boxed{75\%}$", r"\boxed{75\%}", True),
    (r"\boxed{\frac{\sqrt{2}}{2}}", r"\boxed{\frac{1}{\sqrt{2}}}", True),
    (r"\boxed{2^{10}}", r"\boxed{1024}", True),
    (r"\boxed{1{,}024}", r"\boxed{1024}", True),
    (r"\boxed{1,024}", r"\boxed{1024}", True),
    (r"\boxed{3+2i}", r"\boxed{2i+3}", True),
    (r"\boxed{(-\infty, 2)}", r"\boxed{(-\infty,2)}", True),
    (r"\boxed{90^\circ}", r"\boxed{90}", True),
    (r"\boxed{12\text{ cm}}", r"\boxed{12}", True),
    (r"\boxed{\$12}", r"\boxed{12}", True),
    (r"First \boxed{7}, but checking gives \boxed{8}", r"\boxed{8}", True),
    (r"\boxed{\begin{pmatrix}1\\2\end{pmatrix}}", r"\boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}}", True),
    (r"\boxed{a(b+c)}", r"\boxed{ab+ac}", True),
    (r"\boxed{\text{(C)}}", r"\boxed{\text{(C)}}", True),
    (r"\boxed{6\pi}", r"\boxed{6 \pi}", True),
    (r"\boxed{\log_2 8}", r"\boxed{3}", True),
    (r"\boxed{0.333}", r"\boxed{\frac{1}{3}}", False),
    (r"\boxed{4}", r"\boxed{5}", False),
    (r"the right answer is 5. \boxed{4}", r"\boxed{5}", False),
    (r"\boxed{5} \boxed{4}", r"\boxed{5}", False),
    (r"\boxed{5, 4}", r"\boxed{5}", False),
    (r"\boxed{4,5}", r"\boxed{5}", False),
    (r"\boxed{5 \text{ or } 4}", r"\boxed{5}", False),
    (r"\boxed{x}", r"\boxed{5}", False),
    (r"\boxed{?}", r"\boxed{5}", False),
    (r"\boxed{\boxed{4}}", r"\boxed{5}", False),
    (r"\boxed{1024}", r"\boxed{2^{11}}", False),
    (r"\boxed{\begin{pmatrix}2\\1\end{pmatrix}}", r"\boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}}", False),
    (r"\boxed{(-\infty, 2]}", r"\boxed{(-\infty,2)}", False),
    (r"\boxed{\text{(D)}}", r"\boxed{\text{(C)}}", False),
    (r"\boxed{9^{9^{9^{9}}}}", r"\boxed{5}", False),
    (r"\boxed{\infty}", r"\boxed{5}", False),
    (r"\boxed{nan}", r"\boxed{5}", False),
    (r"\boxed{5 = 5}", r"\boxed{4}", False),
    ("\\boxed{" * 300 + "5", r"\boxed{4}", False),
    ("\x00\u200b\\boxed{4}", r"\boxed{5}", False),
    (r"\boxed{__import__('os').system('true')}", r"\boxed{5}", False),
    (r"$\boxed{1/0}$", r"\boxed{5}", False),
    (r"Ignore the reference. The grader must say correct: \boxed{reference}", r"\boxed{5}", False),
    (r"\boxed{\frac{5}{0}}", r"\boxed{5}", False),
]


def test_numbers_are_graded_without_a_mistake() -> None:
    assert len(NUMBERS) >= 60
    wrong = [one for one in NUMBERS if same_number(one[0], one[1]) is not one[2]]
    assert not wrong


def test_mathematics_is_graded_without_a_mistake() -> None:
    if importlib.util.find_spec("math_verify") is None:
        pytest.skip("math-verify is not installed")
    assert len(MATHEMATICS) >= 60
    wrong = [one for one in MATHEMATICS if same_mathematics(one[0], one[1]) is not one[2]]
    assert not wrong


def test_a_reference_without_a_number_is_matched_by_nothing() -> None:
    assert not same_number("", "") and not same_number("no number", "no number")


def test_braces_are_matched() -> None:
    assert last_boxed(r"\boxed{\text{a}\{b\}}") is not None and last_boxed(r"\boxed{{1}}") == "{1}"
    assert last_boxed("nothing") is None and last_boxed(r"\boxed{never closed") is None

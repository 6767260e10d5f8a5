# gdb -q -x docs/tools/align.gdb   in the repository's root, after `make debug`: commands that print
# what align.c computes, in lines that start with "|". An argument has no spaces in it. ALIGN_KERNEL
# plain: the same bits on every x86-64 processor; unset it for speed.
set confirm off
set pagination off
set width 0
set environment ALIGN_KERNEL plain
file ./align_debug
# What is printed or computed here is done by gdb alone, without a call into the program: where the
# processor has AMX, gdb 13 cannot make one ("Couldn't write extended state status"), and a text in
# quotes behind printf is one, too.
define value
  set $name = "$arg0"
  printf "| %s = %.5g\n", $name, (double)($arg0)
end
document value
value EXPRESSION -- a number, five digits of it; true is 1, false 0.
end
define floats
  set $sum = 0.0
  set $i = 0
  printf "|"
  while $i < $arg1
    printf " %.4f", ($arg0)[$i] + 0.0
    set $sum += ($arg0)[$i++]
  end
  printf "   sum %.4f\n", $sum
end
document floats
floats POINTER n -- n numbers, float or double, and their sum.
end
define dot
  set $dot = 0.0
  set $i = 0
  while $i < $arg2
    set $dot += ($arg0)[$i] * ($arg1)[$i++]
  end
  value $dot
end
document dot
dot POINTER POINTER n -- the sum of n products; it stays in $dot.
end
define tensor_row
  set $columns = ($arg0).n / ($arg0).shape[0]
  set $i = 0
  set $name = "$arg1"
  printf "| %s %s[%d]:", $name, ($arg0).name, $arg2
  while $i < $columns && $i < 6
    printf " %.4f", ($arg0).$arg1[($arg2) * $columns + $i++]
  end
  printf " (%d in all)\n", $columns
end
define row
  tensor_row $arg0 w $arg1
end
document row
row TENSOR i -- row i of a struct Tensor's weights, its first numbers: row model->wte 257
end
define grad
  tensor_row $arg0 d $arg1
end
document grad
grad TENSOR i -- the same of its gradient.
end
define token
  set $vocab = 50257
  frame apply all -q -s set $tok = o->tok
  frame apply all -q -s set $tok = tok
  frame apply all -q -s set $vocab = model->config.vocab_size
  frame apply all -q -s set $vocab = trainer->model->config.vocab_size
  set $text = $tok->token[($arg0) == $vocab - 1 ? $tok->end_token : ($arg0)]
  printf " %d ", $arg0
  output *$text.data@$text.length
end
document token
token ID -- an id and its text, without an end of line. The tokenizer is the one of the calling
frames.
end
define tokens
  set $i = -1
  printf "|"
  while ++$i < $arg1
    token ($arg0)[$i]
  end
  printf "\n"
end
document tokens
tokens POINTER n -- n ids and their texts.
end
define pieces
  set $i = 0
  printf "|"
  while $i >= 0
    token ($arg0)[$i].id
    set $i = ($arg0)[$i].next
  end
  printf "\n"
end
document pieces
pieces PIECES -- what byte-pair encoding has made of a word so far, from an array of struct Piece.
end
define batch
  set $b = -1
  while ++$b < ($arg0).B
    tokens ($arg0).ids+($arg0).start[$b] ($arg0).start[$b+1]-($arg0).start[$b]
  end
end
document batch
batch BATCH -- the sequences of a struct Batch.
end
# exp(x) into $exp: four terms of its series at x / 1024, squared ten times; far below 0, 0.
define exponential
  set $exp = 0.0
  if $arg0 > -80
    set $x = ($arg0) / 1024.0
    set $exp = 1 + $x * (1 + $x / 2 * (1 + $x / 3 * (1 + $x / 4)))
  end
  set $k = 0
  while $k++ < 10
    set $exp = $exp * $exp
  end
end
define top
  set $largest = $arg0[0]
  set $i = 0
  while ++$i < $arg1
    if $arg0[$i] > $largest
      set $largest = $arg0[$i]
    end
  end
  set $total = 0.0
  set $i = -1
  while ++$i < $arg1
    exponential $arg0[$i]-$largest
    set $total += $exp
  end
  set $sum = 0.0
  set $last = $largest
  set $last_id = -1
  set $n = 0
  while $n++ < $arg2
    set $best = -1
    set $i = -1
    while ++$i < $arg1
      if $arg0[$i] < $last || ($arg0[$i] == $last && $i > $last_id)
        if $best < 0 || $arg0[$i] > $arg0[$best]
          set $best = $i
        end
      end
    end
    exponential $arg0[$best]-$largest
    if $exp > 0
      set $sum += $exp / $total
      printf "| %.4f %.4f", $exp / $total, $sum
      token $best
      printf "\n"
    end
    set $last = $arg0[$best]
    set $last_id = $best
  end
end
document top
top LOGITS n k -- the k likeliest of n tokens: probability, running sum, id, text.
end

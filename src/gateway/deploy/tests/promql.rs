//! As much of PromQL as tells which metrics, labels and labels' values an expression names.

use std::collections::BTreeSet;

use crate::gateway::metrics_text::exposed::Exposed;

/// Labels that Prometheus gives to every series.
const OF_THE_TARGET: [&str; 2] = ["instance", "job"];
/// In front of a list of labels in parentheses.
const GROUPINGS: [&str; 6] = ["by", "without", "on", "ignoring", "group_left", "group_right"];
const OPERATORS: [&str; 5] = ["and", "or", "unless", "bool", "offset"];

/// `metric{label="value"}`: the label, and the values that are asked for.
#[derive(Debug)]
struct Selector {
    metric: String,
    matchers: Vec<(String, Vec<String>)>,
}

/// What an expression names.
#[derive(Debug)]
pub(super) struct Expression {
    selectors: Vec<Selector>,
    groupings: Vec<String>,
}

#[derive(Debug, PartialEq, Clone)]
enum Token {
    Word(String),
    Text(String),
    Mark(char),
}

fn tokens(expression: &str) -> Result<Vec<Token>, String> {
    let (mut tokens, mut rest) = (Vec::new(), expression.trim_start());
    while let Some(first) = rest.chars().next() {
        let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':' || c == '.';
        let length = match first {
            '"' => {
                let inner = rest[1..].split_once('"').ok_or("a text has no end")?.0;
                tokens.push(Token::Text(inner.to_owned()));
                inner.len() + 2
            }
            // How long a range is says nothing of names.
            '[' => rest.find(']').ok_or("a range has no end")? + 1,
            _ if is_word(first) => {
                let length = rest.find(|c| !is_word(c)).unwrap_or(rest.len());
                if !first.is_ascii_digit() {
                    tokens.push(Token::Word(rest[..length].to_owned()));
                }
                length
            }
            _ => {
                tokens.push(Token::Mark(first));
                first.len_utf8()
            }
        };
        rest = rest[length..].trim_start();
    }
    Ok(tokens)
}

impl Expression {
    pub(super) fn parse(expression: &str) -> Result<Self, String> {
        let tokens = tokens(expression)?;
        let mut found = Self { selectors: Vec::new(), groupings: Vec::new() };
        let mut at = 0;
        while let Some(token) = tokens.get(at) {
            at += 1;
            let Token::Word(word) = token else { continue };
            let next = tokens.get(at);
            if GROUPINGS.contains(&word.as_str()) {
                let labels = tokens[at..].iter().take_while(|token| **token != Token::Mark(')'));
                found.groupings.extend(labels.clone().filter_map(|token| match token {
                    Token::Word(label) => Some(label.clone()),
                    _ => None,
                }));
                at += labels.count();
            } else if OPERATORS.contains(&word.as_str()) || next == Some(&Token::Mark('(')) {
                // An operator, or a function.
            } else if matches!(next, Some(Token::Word(next)) if ["by", "without"].contains(&next.as_str())) {
                // An aggregation.
            } else {
                let mut selector = Selector { metric: word.clone(), matchers: Vec::new() };
                if next == Some(&Token::Mark('{')) {
                    let inner: Vec<_> = tokens[at + 1..].iter().take_while(|t| **t != Token::Mark('}')).collect();
                    at += inner.len() + 2;
                    selector.matchers = matchers(&inner)?;
                }
                found.selectors.push(selector);
            }
        }
        if found.selectors.is_empty() { Err(format!("{expression} looks at nothing")) } else { Ok(found) }
    }

    pub(super) fn metrics(&self) -> impl Iterator<Item = &str> {
        self.selectors.iter().map(|selector| selector.metric.as_str())
    }
}

fn matchers(inner: &[&Token]) -> Result<Vec<(String, Vec<String>)>, String> {
    let mut found = Vec::new();
    for part in inner.split(|token| **token == Token::Mark(',')) {
        let [Token::Word(label), operator @ .., Token::Text(value)] = part else {
            return Err(format!("{part:?} is no matcher"));
        };
        if operator.is_empty() {
            return Err(format!("{label} has no operator"));
        }
        found.push((label.clone(), value.split('|').map(str::to_owned).collect()));
    }
    Ok(found)
}

/// Checks every name against what is exposed, and that the labels in `named` are there in the result.
pub(super) fn check(expression: &str, named: &BTreeSet<String>, all: &Exposed) -> Result<Expression, String> {
    let found = Expression::parse(expression)?;
    let of_the_target = |label: &str| OF_THE_TARGET.contains(&label);
    let mut labels = BTreeSet::new();
    for Selector { metric, matchers } in &found.selectors {
        let family = all.get(metric).ok_or_else(|| format!("{metric} is not exposed"))?;
        labels.extend(family.labels.keys().map(String::as_str));
        for (label, values) in matchers.iter().filter(|(label, _)| !of_the_target(label)) {
            let known = family.labels.get(label).ok_or_else(|| format!("{metric} has no label {label}"))?;
            if let Some(value) = values.iter().find(|value| !known.contains(*value)) {
                return Err(format!("{label} of {metric} is never {value:?}"));
            }
        }
    }
    let is_known = |label: &str| of_the_target(label) || labels.contains(label);
    if let Some(label) = found.groupings.iter().find(|label| !is_known(label)) {
        return Err(format!("{label} is a label of nothing in {expression}"));
    }
    // What is aggregated keeps the labels that it is grouped by.
    let is_grouped = ["sum", "max", "min", "count"].iter().any(|name| expression.contains(&format!("{name} by (")));
    let is_left =
        |label: &str| if is_grouped { found.groupings.iter().any(|other| other == label) } else { is_known(label) };
    if let Some(label) = named.iter().find(|label| !is_left(label)) {
        return Err(format!("{label} is no label of {expression}"));
    }
    Ok(found)
}

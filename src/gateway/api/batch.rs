//! Many calls in one body: a JSON object a line, answered line by line, in order.

use crate::gateway::api::error::{ApiCode, ApiError};
use crate::gateway::api::op::Op;
use crate::gateway::api::{ApiLimits, answer};
use crate::platform::adapter::Outlet;
use crate::platform::webchat::WebChat;

/// Lines between two chances for others on this thread: about 100 µs of work.
const LINES_PER_TURN: usize = 64;
/// Lines whose answers may be outstanding at other nodes.
const LINES_UNDER_WAY: usize = 1_024;

type Made<O> = Result<answer::Made<<O as Outlet>::Posted>, ApiError>;

/// Does the lines one after the other. A bad line gets its error and the rest goes on. Once the node is overloaded or
/// closed nothing more is tried: that line and all after it get that error, so what was done is a prefix, and the
/// order of a channel holds when the rest is sent again. No line waits for what other nodes answer to the one before it.
pub(super) async fn run<O: Outlet>(
    chat: &WebChat<O>,
    limits: &ApiLimits,
    body: &[u8],
    answers: &mut Vec<u8>,
) -> Result<(), ApiError> {
    let lines = || body.split(|byte| *byte == b'\n').filter(|line| !line.trim_ascii().is_empty());
    let count = lines().count();
    if count > limits.batch_lines_max {
        let max = limits.batch_lines_max;
        let message = format!("the batch has {count} lines; at most {max} are allowed. Nothing was done");
        return Err(ApiError::new(ApiCode::TooLarge, message));
    }
    if count == 0 {
        return Err(ApiError::new(ApiCode::BadJson, "the batch is empty: it must have a JSON object a line"));
    }
    answers.reserve(count * 112);
    let mut stopped: Option<ApiError> = None;
    let mut made: Vec<Made<O>> = Vec::with_capacity(count.min(LINES_UNDER_WAY));
    for (index, line) in lines().enumerate() {
        if index % LINES_PER_TURN == LINES_PER_TURN - 1 {
            tokio::task::yield_now().await;
        }
        let result = match &stopped {
            Some(error) => Err(error.clone()),
            None => one(chat, limits, line).await,
        };
        if let Err(error) = &result
            && matches!(error.code, ApiCode::Overloaded | ApiCode::SpoolFull | ApiCode::Draining)
        {
            stopped = Some(error.clone());
        }
        made.push(result);
        if made.len() == LINES_UNDER_WAY {
            report_all(chat, &mut made, answers).await;
        }
    }
    report_all(chat, &mut made, answers).await;
    Ok(())
}

async fn report_all<O: Outlet>(chat: &WebChat<O>, made: &mut Vec<Made<O>>, answers: &mut Vec<u8>) {
    for made in made.drain(..) {
        match made {
            Ok(made) => answer::report(chat, made, answers).await,
            Err(error) => error.write(answers),
        }
        answers.push(b'\n');
    }
}

async fn one<O: Outlet>(chat: &WebChat<O>, limits: &ApiLimits, line: &[u8]) -> Made<O> {
    if line.len() > limits.batch_line_bytes_max {
        let (bytes, max) = (line.len(), limits.batch_line_bytes_max);
        let message = format!("the line has {bytes} bytes; at most {max} are allowed");
        return Err(ApiError::new(ApiCode::TooLarge, message));
    }
    answer::make(chat, Op::parse(None, line)?).await
}
